#include "binding/param_groups.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "binding/rule_names.h"

namespace gradfast {
namespace {

namespace py = pybind11;

Group group_of(const GroupSettings& settings) {
  const auto& [rule, values, keys, lr, counted] = settings;
  Group group;
  group.rule = rule_index(rule);
  const RuleInfo info = rule_info(Rules{}, group.rule);
  TORCH_CHECK_VALUE(
      static_cast<int>(values.size()) == info.hyperparameters &&
          (static_cast<int>(keys.size()) == info.states || static_cast<int>(keys.size()) == info.states + 1),
      "gradfast: rule '", rule, "' takes ", info.hyperparameters, " hyper-parameters and ", info.states,
      " states, got ", values.size(), " and ", keys.size());
  std::copy(values.begin(), values.end(), group.values.value);
  if (lr.has_value()) {
    group.lr = lr->data_ptr();
    group.lr_is_double = lr->scalar_type() == at::kDouble;
  }
  return group;
}

// Numbers, strings, None, and tuples of them; not tensors, whose value may change.
bool is_constant(PyObject* value) {
  if (PyTuple_Check(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
      if (!is_constant(PyTuple_GET_ITEM(value, i))) return false;
    }
    return true;
  }
  return value == Py_None || PyFloat_Check(value) || PyLong_Check(value) || PyUnicode_Check(value);
}

// Lists that say which parameters a group has, not how they are stepped.
bool is_about_members(PyObject* key) {
  return PyUnicode_Check(key) && (PyUnicode_CompareWithASCIIString(key, "params") == 0 ||
                                  PyUnicode_CompareWithASCIIString(key, "param_names") == 0);
}

}  // namespace

ParamGroups::ParamGroups(const std::vector<at::Tensor>& parameters, std::vector<int> group_of)
    : group_of_(std::move(group_of)) {
  for (const at::Tensor& parameter : parameters) {
    parameters_.push_back(py::reinterpret_steal<py::object>(THPVariable_Wrap(parameter)));
  }
}

bool ParamGroups::match(const py::list& param_groups) const {
  static PyObject* const key = PyUnicode_InternFromString("params");
  std::size_t seen = 0;
  for (std::size_t g = 0; g < param_groups.size(); ++g) {
    PyObject* parameters = PyDict_GetItemWithError(PyList_GET_ITEM(param_groups.ptr(), g), key);
    if (parameters == nullptr || !PyList_Check(parameters)) return false;
    const std::size_t last = seen + static_cast<std::size_t>(PyList_GET_SIZE(parameters));
    if (last > parameters_.size()) return false;
    for (Py_ssize_t i = 0; seen < last; ++seen, ++i) {
      if (parameters_[seen].ptr() != PyList_GET_ITEM(parameters, i) || group_of_[seen] != static_cast<int>(g))
        return false;
    }
  }
  return seen == parameters_.size();
}

void ParamGroups::refresh(const py::list& param_groups, const py::function& rule_settings) {
  const std::size_t count = param_groups.size();
  seen_.resize(count);
  settings_.resize(count);
  groups_.resize(count);
  for (std::size_t g = 0; g < count; ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups.ptr(), g);
    if (unchanged(seen_[g], group)) continue;
    seen_[g] = Seen{};  // should what follows throw
    settings_[g] = rule_settings(py::handle(group)).cast<GroupSettings>();
    groups_[g] = group_of(settings_[g]);
    seen_[g] = look_at(group);
  }
}

bool ParamGroups::unchanged(const Seen& seen, PyObject* group) {
  if (!seen.constant || static_cast<std::size_t>(PyDict_GET_SIZE(group)) * 2 != seen.items.size()) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (auto item = seen.items.begin(); item != seen.items.end(); item += 2) {
    PyDict_Next(group, &position, &key, &value);
    if (item[0].ptr() != key || item[1].ptr() != value) return false;
  }
  return true;
}

ParamGroups::Seen ParamGroups::look_at(PyObject* group) {
  Seen seen;
  seen.constant = true;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(group, &position, &key, &value)) {
    seen.items.push_back(py::reinterpret_borrow<py::object>(key));
    seen.items.push_back(py::reinterpret_borrow<py::object>(value));
    seen.constant &= is_constant(value) || is_about_members(key);
  }
  return seen;
}

}  // namespace gradfast

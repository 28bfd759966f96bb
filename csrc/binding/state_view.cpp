#include "binding/state_view.h"

namespace gradfast {
namespace {

namespace py = pybind11;

// No two states of any dictionaries have the same; 0 where Python does not say.
std::uint64_t version_of([[maybe_unused]] PyObject* dictionary) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dictionary)->ma_version_tag;
#else
  return 0;
#endif
}

bool is_version(std::uint64_t version, PyObject* dictionary) {
  return version != 0 && version == version_of(dictionary);
}

}  // namespace

bool StateView::matches(PyObject* state) {
  if (!is_version(version_, state)) {
    if (!same_parameters(state)) return false;
    version_ = version_of(state);
  }
  constexpr std::size_t kAhead = 8;  // dictionaries, to be fetched into the cache
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (i + kAhead < entries_.size()) __builtin_prefetch(entries_[i + kAhead].entries.ptr());
    Entry& entry = entries_[i];
    if (!entry.is_dictionary || is_version(entry.version, entry.entries.ptr())) continue;
    if (!same_values(entry)) return false;
    entry.version = version_of(entry.entries.ptr());
  }
  return true;
}

bool StateView::same_parameters(PyObject* state) const {
  if (static_cast<std::size_t>(PyDict_GET_SIZE(state)) != entries_.size()) return false;
  PyObject *parameter, *entries;
  Py_ssize_t position = 0;
  for (const Entry& entry : entries_) {
    PyDict_Next(state, &position, &parameter, &entries);
    if (parameter != entry.parameter.ptr() || entries != entry.entries.ptr()) return false;
  }
  return true;
}

bool StateView::same_values(const Entry& entry) const {
  if (static_cast<std::size_t>(PyDict_GET_SIZE(entry.entries.ptr())) != entry.values) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (std::uint32_t v = entry.first; v < entry.first + entry.values; ++v) {
    PyDict_Next(entry.entries.ptr(), &position, &key, &value);
    if (value != values_[v].ptr()) return false;
  }
  return true;
}

void StateView::remember(PyObject* state) {
  entries_.clear();
  values_.clear();
  version_ = version_of(state);
  PyObject *parameter, *entries, *key, *value;
  Py_ssize_t outer = 0;
  while (PyDict_Next(state, &outer, &parameter, &entries)) {
    const bool is_dictionary = PyDict_Check(entries);
    entries_.push_back({py::reinterpret_borrow<py::object>(parameter), py::reinterpret_borrow<py::object>(entries),
                        is_dictionary, static_cast<std::uint32_t>(values_.size()), 0, 0});
    if (!is_dictionary) continue;
    Py_ssize_t inner = 0;
    while (PyDict_Next(entries, &inner, &key, &value)) values_.push_back(py::reinterpret_borrow<py::object>(value));
    entries_.back().values = static_cast<std::uint32_t>(PyDict_GET_SIZE(entries));
    entries_.back().version = version_of(entries);
  }
}

}  // namespace gradfast

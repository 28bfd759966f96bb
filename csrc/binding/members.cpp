#include "binding/members.h"

#include <ATen/ops/eq.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "binding/local_part.h"
#include "binding/rule_names.h"
#include "binding/slots.h"

namespace gradfast {
namespace {

namespace py = pybind11;

// A tensor under `key`, or an undefined one.
at::Tensor tensor_at(PyObject* entries, const char* key) {
  PyObject* value = PyDict_GetItemString(entries, key);
  return value != nullptr && THPVariable_Check(value) ? THPVariable_Unpack(value) : at::Tensor();
}

// False where a tensor was given other data since its states were bound: `parameter.data = ...`, `model.half()`.
bool fits(const at::Tensor& parameter, const at::Tensor& state) {
  return state.sizes() == parameter.sizes() && go_together(state.scalar_type(), parameter.scalar_type()) &&
         state.device() == parameter.device();
}

// True for a step count that lies where the parameter's device can read it.
bool counts_for(const at::Tensor& parameter, const at::Tensor& step) {
  return step.scalar_type() == at::kFloat && step.numel() == 1 && step.device() == parameter.device();
}

// Somebody may have written into a parameter that has a master: loaded weights, say. What they wrote counts; where the
// parameter is still the rounded master, the master keeps its digits.
void take_over(Member& member) {
  const at::Tensor& parameter = member.parameter();
  if (member.version == version_of(parameter)) return;
  at::Tensor& master = member.arrays[kParameter];
  master.copy_(at::where(at::eq(master.to(parameter.scalar_type()), parameter), master, parameter.to(at::kFloat)));
  member.version = version_of(parameter);
}

}  // namespace

Members::Members(std::vector<at::Tensor> parameters, std::vector<int> group_of, std::vector<std::string> names) {
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    Member member;
    member.whole = std::move(parameters[i]);
    member.sharded = is_sharded(member.whole);
    member.arrays = {member.sharded ? local_part(member.whole) : member.whole, at::Tensor()};
    member.group = group_of[i];
    member.name = std::move(names[i]);
    members_.push_back(std::move(member));
  }
}

std::vector<int> Members::bind(const py::dict& state, const std::vector<GroupSettings>& groups) {
  bool rebind = take_gradients();
  if (!state_view_.matches(state.ptr())) {
    state_view_.remember(state.ptr());
    rebind = true;
  }
  rebind |= !same_rules(groups);
  std::vector<int> missing = rebind ? bind_states(state, groups) : std::vector<int>{};
  for (Member& member : members_) {
    if (member.has_master && member.active && missing.empty()) take_over(member);
  }
  return missing;
}

bool Members::same_rules(const std::vector<GroupSettings>& groups) const {
  return std::equal(
      bound_rules_.begin(), bound_rules_.end(), groups.begin(), groups.end(),
      [](const std::string& rule, const GroupSettings& settings) { return rule == std::get<0>(settings); });
}

// Of a DTensor: takes the part of the parameter again, for whoever moves or reshards a model exchanges it, and returns
// that of the gradient.
at::Tensor Members::take_parts(Member* member, const at::Tensor& gradient, bool* differs) {
  TORCH_CHECK_TYPE(is_sharded(gradient), "gradfast: '", member->name,
                   "' is a DTensor and its gradient is a plain tensor; make it one with DTensor.from_local");
  at::Tensor part = local_part(member->whole);
  if (!part.is_same(member->parameter())) {
    member->parameter() = std::move(part);
    *differs = true;
  }
  return local_part(gradient);
}

// Reads every `.grad`. Returns true if the states must be looked up again: a parameter got its first gradient, or has
// none any more, or is no longer of the kind that its states were made for.
bool Members::take_gradients() {
  bool differs = false;
  holds_gradients_ = true;
  for (Member& member : members_) {
    const at::Tensor& whole = member.whole.grad();
    const bool active = whole.defined();
    differs |= active != member.active;
    member.active = active;
    if (!active) continue;
    const at::Tensor part = member.sharded ? take_parts(&member, whole, &differs) : at::Tensor();
    const at::Tensor& gradient = member.sharded ? part : whole;
    check_tensor(gradient, "the gradient", member.name, false);
    const at::Tensor& parameter = member.parameter();
    check_match(parameter, gradient, "the gradient", member.name);
    if (!parameter.is_non_overlapping_and_dense()) check_tensor(parameter, "the data", member.name, true);
    for (std::size_t a = 0; a < member.arrays.size(); ++a) {
      if (a != kGradient) differs |= !fits(parameter, member.arrays[a]);
    }
    differs |= member.step.defined() && !counts_for(parameter, member.step);
    const bool lazy = gradient.is_conj() || gradient.is_neg();
    member.arrays[kGradient] = lazy ? gradient.resolve_conj().resolve_neg() : gradient;
  }
  return differs;
}

// Looks up the states of every parameter with a gradient. Returns those that have none.
std::vector<int> Members::bind_states(const py::dict& state, const std::vector<GroupSettings>& groups) {
  bound_rules_.assign(groups.size(), "");
  std::vector<int> missing;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    Member& member = members_[i];
    if (!member.active) continue;
    const py::object key = py::cast(member.whole);
    PyObject* entries = PyDict_GetItemWithError(state.ptr(), key.ptr());
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (!bind_member(member, entries, groups[member.group])) missing.push_back(static_cast<int>(i));
  }
  if (missing.empty()) {
    for (std::size_t g = 0; g < groups.size(); ++g) bound_rules_[g] = std::get<0>(groups[g]);
  }
  return missing;
}

bool Members::bind_member(Member& member, PyObject* entries, const GroupSettings& settings) {
  const at::Tensor parameter = member.parameter();
  check_tensor(parameter, "the data", member.name, true);
  const std::vector<std::string>& keys = std::get<2>(settings);
  const auto rule_states = static_cast<std::size_t>(rule_info(Rules{}, rule_index(std::get<0>(settings))).states);
  const bool has_master = keys.size() > rule_states && is_narrow(parameter.scalar_type());
  std::vector<at::Tensor> states;
  for (std::size_t k = 0; k < rule_states + has_master; ++k) {
    at::Tensor state = entries == nullptr ? at::Tensor() : tensor_at(entries, keys[k].c_str());
    if (!state.defined()) return false;
    if (member.sharded && is_sharded(state)) state = local_part(state);
    check_tensor(state, "the state", member.name, true);
    check_match(parameter, state, ("the state " + keys[k]).c_str(), member.name);
    states.push_back(std::move(state));
  }
  if (has_master && states.back().scalar_type() != at::kFloat) return false;
  const bool bound = rule_states > 0 && member.arrays.size() > kFirstState;
  const bool loaded = rule_states > 0 && !(bound && member.arrays[kFirstState].is_same(states[0]));
  at::Tensor step = entries == nullptr ? at::Tensor() : tensor_at(entries, "step");
  if (!step.defined()) {
    if (std::get<4>(settings)) return false;
    if (!member.updates.defined() || loaded || member.updates.device() != parameter.device()) {
      // A state that was there before this engine saw it has had its first update.
      const auto options = at::TensorOptions().dtype(at::kFloat).device(parameter.device());
      member.updates = at::full({}, member.fresh ? 0.0 : 1.0, options);
    }
    step = member.updates;
  }
  if (!counts_for(parameter, step)) return false;
  member.slot = nullptr;  // it is of the arrays before
  member.arrays = {has_master ? states.back() : parameter, member.arrays[kGradient]};
  member.arrays.insert(member.arrays.end(), states.begin(), states.begin() + static_cast<std::ptrdiff_t>(rule_states));
  if (has_master) member.arrays.push_back(parameter);
  member.has_master = has_master;
  member.version = -1;
  member.step = std::move(step);
  member.fresh = false;
  return true;
}

void Members::mark_fresh(const std::vector<int>& parameters) {
  for (const int i : parameters) members_[i].fresh = true;
}

void Members::forget_fresh() {
  for (Member& member : members_) member.fresh = false;
}

std::vector<int> Members::never_updated() const {
  std::vector<int> indices;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    const at::Tensor& updates = members_[i].updates;
    const bool none_yet = members_[i].fresh || (updates.defined() && updates.item<float>() == 0);
    if (none_yet) indices.push_back(static_cast<int>(i));
  }
  return indices;
}

at::ScalarType Members::norm_dtype() const {
  const bool is_double = std::any_of(members_.begin(), members_.end(), [](const Member& member) {
    return c10::toRealValueType(member.parameter().scalar_type()) == at::kDouble;
  });
  return is_double ? at::kDouble : at::kFloat;
}

}  // namespace gradfast

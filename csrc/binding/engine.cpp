#include "binding/engine.h"

#include <ATen/Functions.h>
#include <ATen/record_function.h>

#include <algorithm>

#include "binding/rule_names.h"
#include "binding/slots.h"

namespace gradfast {
namespace {

namespace py = pybind11;

Group group_of(const GroupSettings& settings) {
  const auto& [rule, values, keys, lr] = settings;
  Group group;
  group.rule = rule_index(rule);
  const RuleInfo info = rule_info(Rules{}, group.rule);
  TORCH_CHECK_VALUE(
      static_cast<int>(values.size()) == info.hyperparameters && static_cast<int>(keys.size()) == info.states,
      "gradfast: rule '", rule, "' takes ", info.hyperparameters, " hyper-parameters and ", info.states,
      " states, got ", values.size(), " and ", keys.size());
  std::copy(values.begin(), values.end(), group.values.value);
  if (lr.has_value()) {
    group.lr = lr->data_ptr();
    group.lr_is_double = lr->scalar_type() == at::kDouble;
  }
  return group;
}

// A tensor under `key`, or an undefined one.
at::Tensor tensor_at(PyObject* entries, const char* key) {
  PyObject* value = PyDict_GetItemString(entries, key);
  return value != nullptr && THPVariable_Check(value) ? THPVariable_Unpack(value) : at::Tensor();
}

bool same_structure(const Slot& a, const Slot& b) {
  return a.elements == b.elements && a.dtype == b.dtype && a.group == b.group && a.layout == b.layout;
}

}  // namespace

Engine::Engine(std::vector<at::Tensor> parameters, std::vector<int> group_of, std::vector<std::string> names) {
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    Member member;
    member.arrays = {std::move(parameters[i]), at::Tensor()};
    member.group = group_of[i];
    member.name = std::move(names[i]);
    members_.push_back(std::move(member));
  }
}

std::vector<int> Engine::step(py::dict state, const std::vector<GroupSettings>& groups, double max_norm,
                              double norm_type, bool propagate) {
  RECORD_FUNCTION("gradfast::step", std::vector<c10::IValue>());
  bool rebind = collect_gradients();
  rebind |= !state_view_.unchanged(state.ptr()) || bound_rules_.size() != groups.size();
  for (std::size_t g = 0; !rebind && g < groups.size(); ++g) rebind = bound_rules_[g] != std::get<0>(groups[g]);
  if (rebind) {
    const std::vector<int> missing = bind_states(state, groups);
    if (!missing.empty()) return missing;
  }
  norm_ = norm_of(norm_type);
  fill_slots(groups);
  for (Part& part : parts_) {
    part.problem.norm = norm_;
    part.problem.clip.max_norm = max_norm;
    part.problem.clip.nonfinite = propagate ? NonFinite::propagate : NonFinite::skip;
  }
  {
    const py::gil_scoped_release release;
    run_parts(norm_);
  }
  for (Member& member : members_) {
    if (!member.active) continue;
    for (std::size_t a = 0; a < member.arrays.size(); ++a) {
      if (a != kGradient) bump_version(member.arrays[a]);
    }
    member.arrays[kGradient].reset();  // not ours to keep alive: zero_grad() frees it
  }
  return {};
}

// Reads every `.grad`. Returns true if a parameter got its first gradient, or has none any more.
bool Engine::collect_gradients() {
  bool differs = false;
  for (Member& member : members_) {
    const at::Tensor& gradient = member.parameter().grad();
    const bool active = gradient.defined();
    differs |= active != member.active;
    member.active = active;
    if (!active) continue;
    check_tensor(gradient, "the gradient", member.name, false);
    check_match(member.parameter(), gradient, "the gradient", member.name);
    const bool lazy = gradient.is_conj() || gradient.is_neg();
    member.arrays[kGradient] = lazy ? gradient.resolve_conj().resolve_neg() : gradient;
  }
  return differs;
}

// Looks up the states of every parameter with a gradient. Returns those that have none.
std::vector<int> Engine::bind_states(const py::dict& state, const std::vector<GroupSettings>& groups) {
  bound_rules_.assign(groups.size(), "");
  for (const GroupSettings& settings : groups) group_of(settings);  // checks
  std::vector<int> missing;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    Member& member = members_[i];
    if (!member.active) continue;
    const py::object key = py::cast(member.parameter());
    PyObject* entries = PyDict_GetItemWithError(state.ptr(), key.ptr());
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (!bind_member(member, entries, groups[member.group])) missing.push_back(static_cast<int>(i));
  }
  if (missing.empty()) {
    for (std::size_t g = 0; g < groups.size(); ++g) bound_rules_[g] = std::get<0>(groups[g]);
  }
  return missing;
}

bool Engine::bind_member(Member& member, PyObject* entries, const GroupSettings& settings) {
  check_tensor(member.parameter(), "the data", member.name, true);
  const std::vector<std::string>& keys = std::get<2>(settings);
  std::vector<at::Tensor> states;
  for (const std::string& key : keys) {
    at::Tensor state = entries == nullptr ? at::Tensor() : tensor_at(entries, key.c_str());
    if (!state.defined()) return false;
    check_tensor(state, "the state", member.name, true);
    check_match(member.parameter(), state, ("the state " + key).c_str(), member.name);
    states.push_back(std::move(state));
  }
  const bool bound = member.arrays.size() > kFirstState;
  const bool loaded = !states.empty() && !(bound && member.arrays[kFirstState].is_same(states[0]));
  at::Tensor step = entries == nullptr ? at::Tensor() : tensor_at(entries, "step");
  if (!step.defined()) {
    if (std::get<0>(settings).rfind("adam", 0) == 0) return false;
    if (!member.updates.defined() || loaded || member.updates.device() != member.parameter().device()) {
      // A state that was there before this engine saw it has had its first update.
      const auto options = at::TensorOptions().dtype(at::kFloat).device(member.parameter().device());
      member.updates = at::full({}, member.fresh ? 0.0 : 1.0, options);
      member.fresh = false;
    }
    step = member.updates;
  }
  if (step.scalar_type() != at::kFloat || step.numel() != 1 || step.device() != member.parameter().device())
    return false;
  member.arrays.resize(kFirstState);
  member.arrays.insert(member.arrays.end(), states.begin(), states.end());
  member.step = std::move(step);
  return true;
}

void Engine::mark_fresh(const std::vector<int>& parameters) {
  for (const int i : parameters) members_[i].fresh = true;
}

std::vector<int> Engine::never_updated() {
  std::vector<int> indices;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    const at::Tensor& updates = members_[i].updates;
    if (updates.defined() && updates.item<float>() == 0) indices.push_back(static_cast<int>(i));
  }
  return indices;
}

Engine::Part& Engine::part_on(at::Device device) {
  for (Part& part : parts_) {
    if (part.device == device) return part;
  }
  parts_.emplace_back(device);
  return parts_.back();
}

void Engine::fill_slots(const std::vector<GroupSettings>& groups) {
  for (Part& part : parts_) {
    part.previous.swap(part.problem.slots);
    part.problem.slots.clear();
    part.problem.layouts.clear();
    part.problem.groups.clear();
    part.members.clear();
    for (const GroupSettings& settings : groups) part.problem.groups.push_back(group_of(settings));
  }
  for (std::size_t i = 0; i < members_.size(); ++i) {
    const Member& member = members_[i];
    if (!member.active) continue;
    const std::size_t parts = parts_.size();
    Part& part = part_on(member.parameter().device());
    if (parts_.size() != parts) {
      for (const GroupSettings& settings : groups) part.problem.groups.push_back(group_of(settings));
    }
    add_slot(member.arrays, member.step.data_ptr<float>(), member.group, member.name, &part.problem);
    part.members.push_back(static_cast<int>(i));
  }
}

// True if a part's plan must be made anew.
bool Engine::changed(Part& part) const {
  std::vector<int> rules;
  for (const Group& group : part.problem.groups) rules.push_back(group.rule);
  const bool differs = rules != part.previous_rules || !part.problem.layouts.empty() ||
                       !std::equal(part.problem.slots.begin(), part.problem.slots.end(), part.previous.begin(),
                                   part.previous.end(), same_structure);
  part.previous_rules = std::move(rules);
  return differs;
}

void Engine::run_parts(const Norm& norm) {
  if (parts_.size() == 1) {
    parts_[0].backend->run(parts_[0].problem, changed(parts_[0]), Phase::both, {});
    return;
  }
  // Several devices: each measures its own, the sums are joined, and each updates by the same total.
  at::Tensor total;
  for (Part& part : parts_) {
    part.backend->run(part.problem, changed(part), Phase::measure, {});
    const at::Tensor sum = part.backend->sum();
    if (!total.defined()) {
      total = sum;
    } else {
      const at::Tensor moved = sum.to(total.device());
      total = norm.kind == NormKind::infinity ? at::maximum(total, moved) : at::add(total, moved);
    }
  }
  for (Part& part : parts_) part.backend->run(part.problem, false, Phase::update, total.to(part.device));
}

// fp64 if a parameter is, else fp32; zero before the first step.
at::Tensor Engine::result(at::Tensor value) const {
  const bool is_double = std::any_of(members_.begin(), members_.end(), [](const Member& member) {
    return c10::toRealValueType(member.parameter().scalar_type()) == at::kDouble;
  });
  return value.to(is_double ? at::kDouble : at::kFloat);
}

at::Tensor Engine::grad_norm() {
  return result(parts_.empty() ? at::zeros({}, at::kDouble) : parts_[0].backend->norm());
}

at::Tensor Engine::coefficient() {
  return result(parts_.empty() ? at::ones({}, at::kDouble) : parts_[0].backend->coefficient());
}

std::int64_t Engine::skipped_steps() { return parts_.empty() ? 0 : parts_[0].backend->report().skipped_steps; }

std::int64_t Engine::last_skipped() { return parts_.empty() ? 0 : parts_[0].backend->report().skipped; }

bool Engine::skipped_on_host() {
  return !parts_.empty() && parts_[0].backend->is_host() && parts_[0].backend->report().skipped != 0;
}

std::string Engine::nonfinite_parameter() {
  for (Part& part : parts_) {
    const std::int32_t slot = part.backend->report().first_nonfinite;
    if (slot >= 0) return members_[part.members[slot]].name;
  }
  return "";
}

std::vector<std::pair<std::string, at::Tensor>> Engine::grad_norms() {
  std::vector<std::pair<std::string, at::Tensor>> norms;
  for (Part& part : parts_) {
    at::Tensor values = part.backend->tensor_sums();
    if (norm_.kind == NormKind::two) values = values.sqrt();
    if (norm_.kind == NormKind::general) values = values.pow(1.0 / norm_.p);
    const std::vector<at::Tensor> each = result(values).unbind();
    for (std::size_t slot = 0; slot < each.size(); ++slot) {
      norms.emplace_back(members_[part.members[slot]].name, each[slot]);
    }
  }
  return norms;
}

}  // namespace gradfast

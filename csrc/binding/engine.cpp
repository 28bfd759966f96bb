#include "binding/engine.h"

#include <ATen/ops/add.h>
#include <ATen/ops/div.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>

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

bool same_structure(const Slot& a, const Slot& b) {
  return a.elements == b.elements && a.dtype == b.dtype && a.group == b.group && a.layout == b.layout &&
         a.mixed == b.mixed && a.formats == b.formats;
}

// The one value that `tensor` holds, where a device can read it.
at::Tensor scalar_on(at::Device device, const std::optional<at::Tensor>& tensor, const char* name) {
  if (!tensor.has_value()) return {};
  TORCH_CHECK_VALUE(tensor->numel() == 1, "gradfast: ", name, " must hold one number, got the shape ", tensor->sizes());
  return tensor->detach().to(at::TensorOptions().device(device).dtype(at::kFloat), /*non_blocking=*/true);
}

const float* address(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

}  // namespace

Engine::Engine(std::vector<at::Tensor> parameters, std::vector<int> group_of, std::vector<std::string> names)
    : members_(std::move(parameters), std::move(group_of), std::move(names)) {}

std::vector<int> Engine::step(const py::dict& state, const std::vector<GroupSettings>& groups,
                              const StepSettings& settings) {
  RECORD_FUNCTION("gradfast::step", std::vector<c10::IValue>());
  std::vector<int> missing = prepare(state, groups, settings);
  if (!missing.empty()) return missing;
  {
    const py::gil_scoped_release release;
    if (parts_.size() == 1) {
      parts_[0].backend->run(parts_[0].problem, changed(parts_[0]), Phase::both, {});
    } else if (parts_.size() > 1) {
      measure_parts();
      update_parts(total_sum());
    }
  }
  members_.finish_step();
  return missing;
}

std::vector<int> Engine::measure(const py::dict& state, const std::vector<GroupSettings>& groups,
                                 const StepSettings& settings) {
  RECORD_FUNCTION("gradfast::measure", std::vector<c10::IValue>());
  std::vector<int> missing = prepare(state, groups, settings);
  if (!missing.empty()) return missing;
  const py::gil_scoped_release release;
  measure_parts();
  return missing;
}

void Engine::update(const at::Tensor& total_sum) {
  RECORD_FUNCTION("gradfast::update", std::vector<c10::IValue>());
  TORCH_CHECK_VALUE(total_sum.numel() == 1, "gradfast: the total sum must hold one number, got the shape ",
                    total_sum.sizes());
  {
    const py::gil_scoped_release release;
    update_parts(total_sum.detach().to(at::kDouble).reshape({}));
  }
  members_.finish_step();
}

std::vector<int> Engine::prepare(const py::dict& state, const std::vector<GroupSettings>& groups,
                                 const StepSettings& settings) {
  const c10::NoGradGuard no_grad;
  std::vector<int> missing = members_.bind(state, groups);
  if (!missing.empty()) return missing;
  fill_slots(groups);
  // A process that holds nothing still decides with the others, by their sum: it skips, counts and raises as they do.
  if (parts_.empty()) part_on(members_.size() == 0 ? at::Device(at::kCPU) : members_[0].parameter().device());
  apply(settings);
  return missing;
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

void Engine::apply(const StepSettings& settings) {
  norm_ = norm_of(settings.norm_type);
  for (Part& part : parts_) {
    part.loss_scale = scalar_on(part.device, settings.loss_scale, "loss_scale");
    part.found_infinite = scalar_on(part.device, settings.found_infinite, "found_infinite");
    part.problem.norm = norm_;
    part.problem.clip.max_norm = settings.max_norm;
    part.problem.clip.nonfinite = settings.propagate ? NonFinite::propagate : NonFinite::skip;
    part.problem.loss_scale = address(part.loss_scale);
    part.problem.found_infinite = address(part.found_infinite);
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

void Engine::measure_parts() {
  for (Part& part : parts_) part.backend->run(part.problem, changed(part), Phase::measure, {});
}

void Engine::update_parts(const at::Tensor& total) {
  for (Part& part : parts_) part.backend->run(part.problem, false, Phase::update, total.to(part.device));
}

at::Tensor Engine::total_sum() {
  at::Tensor total;
  for (Part& part : parts_) {
    const at::Tensor sum = part.backend->sum();
    if (!total.defined()) {
      total = sum;
    } else {
      const at::Tensor moved = sum.to(total.device());
      total = norm_.kind == NormKind::infinity ? at::maximum(total, moved) : at::add(total, moved);
    }
  }
  return total.defined() ? total : at::zeros({}, at::kDouble);
}

std::vector<std::pair<std::vector<int>, at::Tensor>> Engine::member_sums() {
  std::vector<std::pair<std::vector<int>, at::Tensor>> sums;
  for (Part& part : parts_) sums.emplace_back(part.members, part.backend->tensor_sums());
  return sums;
}

at::Tensor Engine::grad_norm() {
  const at::Tensor norm = parts_.empty() ? at::zeros({}, at::kDouble) : parts_[0].backend->norm();
  return norm.to(members_.norm_dtype());
}

at::Tensor Engine::coefficient() {
  const at::Tensor coefficient = parts_.empty() ? at::ones({}, at::kDouble) : parts_[0].backend->coefficient();
  return coefficient.to(members_.norm_dtype());
}

std::int64_t Engine::skipped_steps() { return parts_.empty() ? 0 : parts_[0].backend->report().skipped_steps; }

std::int64_t Engine::last_skipped() { return parts_.empty() ? 0 : parts_[0].backend->report().skipped; }

bool Engine::skipped_on_host() {
  return !parts_.empty() && parts_[0].backend->is_host() && parts_[0].backend->report().skipped != 0;
}

std::optional<at::Tensor> Engine::found_infinite() {
  for (Part& part : parts_) {
    if (!part.members.empty()) return part.backend->found_infinite();
  }
  return std::nullopt;
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
    if (part.loss_scale.defined()) values = at::div(values, part.loss_scale);
    const std::vector<at::Tensor> each = values.to(members_.norm_dtype()).unbind();
    for (std::size_t slot = 0; slot < each.size(); ++slot) {
      norms.emplace_back(members_[part.members[slot]].name, each[slot]);
    }
  }
  return norms;
}

}  // namespace gradfast

#include "binding/engine.h"

#include <ATen/ops/add.h>
#include <ATen/ops/div.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "binding/policy_chain.h"
#include "binding/rule_names.h"
#include "binding/slots.h"

namespace gradfast {
namespace {

namespace py = pybind11;

// A step of this many elements takes some 100 us, and is over before another thread could use the Python lock, for
// which that asks after 5 ms. Giving it away would mean holding a reference to every gradient.
constexpr std::int64_t kBriefElements = 256 * 1024;

std::int64_t elements_of(const Problem& problem) {
  std::int64_t elements = 0;
  for (const Slot& slot : problem.slots) elements += slot.elements;
  return elements;
}

bool same_structure(const Slot& a, const Slot& b) {
  return a.elements == b.elements && a.dtype == b.dtype && a.group == b.group && a.layout == b.layout &&
         a.mixed == b.mixed && a.formats == b.formats && a.row_length == b.row_length && a.weights == b.weights;
}

// The one value that `tensor` holds, where a device can read it.
at::Tensor scalar_on(at::Device device, const std::optional<at::Tensor>& tensor, const char* name) {
  if (!tensor.has_value()) return {};
  TORCH_CHECK_VALUE(tensor->numel() == 1, "gradfast: ", name, " must hold one number, got the shape ", tensor->sizes());
  return tensor->detach().to(at::TensorOptions().device(device).dtype(at::kFloat), /*non_blocking=*/true);
}

const float* address(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

}  // namespace

Engine::Engine(std::vector<at::Tensor> parameters, std::vector<int> group_of, std::vector<std::string> names,
               std::vector<bool> by_units)
    : groups_(parameters, group_of),
      members_(std::move(parameters), std::move(group_of), std::move(names)),
      by_units_(std::move(by_units)) {
  by_units_.resize(members_.size());
}

bool Engine::read_groups(const py::list& param_groups, const py::function& rule_settings) {
  if (!groups_.match(param_groups)) return false;
  groups_.refresh(param_groups, rule_settings);
  return true;
}

std::vector<int> Engine::step(const py::dict& state, const StepSettings& settings) {
  RECORD_FUNCTION("gradfast::step", std::vector<c10::IValue>());
  std::vector<int> missing = prepare(state, settings);
  if (!missing.empty()) return missing;
  const bool brief = parts_.size() == 1 && parts_[0].brief;
  {
    std::optional<py::gil_scoped_release> release;
    if (!brief) {
      members_.hold_gradients();
      release.emplace();
    }
    if (parts_.size() == 1) {
      run(parts_[0], Phase::both, {});
    } else if (parts_.size() > 1) {
      run_parts(Phase::measure, {});
      run_parts(Phase::update, total_sum());
    }
  }
  members_.finish_step();
  return missing;
}

std::vector<int> Engine::measure(const py::dict& state, const StepSettings& settings) {
  RECORD_FUNCTION("gradfast::measure", std::vector<c10::IValue>());
  std::vector<int> missing = prepare(state, settings);
  if (!missing.empty()) return missing;
  members_.hold_gradients();
  const py::gil_scoped_release release;
  run_parts(Phase::measure, {});
  return missing;
}

bool Engine::measures_updates_apart() const {
  return !parts_.empty() && gradfast::measures_updates_apart(parts_[0].problem);
}

void Engine::measure_updates(const at::Tensor& total_sum, const std::optional<at::Tensor>& parameter_sums) {
  RECORD_FUNCTION("gradfast::measure_updates", std::vector<c10::IValue>());
  const py::gil_scoped_release release;
  take_parameter_sums(parameter_sums);
  run_parts(Phase::measure_updates, total_sum);
}

void Engine::update(const at::Tensor& total_sum, const std::optional<at::Tensor>& parameter_sums,
                    const std::optional<at::Tensor>& update_means) {
  RECORD_FUNCTION("gradfast::update", std::vector<c10::IValue>());
  {
    const py::gil_scoped_release release;
    take_parameter_sums(parameter_sums);
    for (Part& part : parts_) {
      part.update_means = by_parameter(update_means, part, "the means of squared updates");
      part.problem.update_means = part.update_means.defined() ? part.update_means.const_data_ptr<double>() : nullptr;
    }
    run_parts(Phase::update, total_sum);
  }
  members_.finish_step();
}

void Engine::take_parameter_sums(const std::optional<at::Tensor>& sums) {
  for (Part& part : parts_) {
    part.parameter_sums = by_parameter(sums, part, "the parameters' sums");
    part.problem.parameter_sums =
        part.parameter_sums.defined() ? part.parameter_sums.const_data_ptr<double>() : nullptr;
  }
}

// A number for each parameter, on the part's device; undefined where none is given.
at::Tensor Engine::by_parameter(const std::optional<at::Tensor>& values, const Part& part, const char* what) const {
  if (!values.has_value()) return {};
  TORCH_CHECK_VALUE(values->numel() == static_cast<std::int64_t>(members_.size()), "gradfast: ", what,
                    " must hold a number for each of ", members_.size(), " parameters, got ", values->numel());
  return values->to(part.device, at::kDouble).contiguous();
}

std::vector<int> Engine::prepare(const py::dict& state, const StepSettings& settings) {
  const c10::NoGradGuard no_grad;
  if (!members_.refresh(state, groups_.settings())) {
    std::vector<int> missing = members_.bind(state, groups_.settings());
    if (!missing.empty()) return missing;
    fill_slots(settings);
  }
  // A process that holds nothing still decides with the others, by their sum: it skips, counts and raises as they do.
  if (parts_.empty()) part_on(members_.size() == 0 ? at::Device(at::kCPU) : members_[0].parameter().device());
  apply(settings);
  return {};
}

Engine::Part& Engine::part_on(at::Device device) {
  for (Part& part : parts_) {
    if (part.device == device) return part;
  }
  parts_.emplace_back(device);
  return parts_.back();
}

void Engine::fill_slots(const StepSettings& settings) {
  for (Part& part : parts_) {
    part.previous.swap(part.problem.slots);
    part.previous_layouts.swap(part.problem.layouts);
    part.problem.slots.clear();
    part.problem.layouts.clear();
    part.members.clear();
  }
  for (std::size_t i = 0; i < members_.size(); ++i) {
    const Member& member = members_[i];
    if (!member.active) continue;
    if (settings.element_limit != INFINITY) check_ordered(member.parameter(), member.name);
    Part& part = part_on(member.parameter().device());
    const Precision precision{member.has_master, settings.parameters_by_chance, settings.states_by_chance};
    add_slot(member.arrays, member.step.data_ptr<float>(), member.group, member.name, &part.problem, precision,
             by_units_[i] ? kParameter : kNotByUnits);
    part.problem.slots.back().number = static_cast<std::uint32_t>(i);
    part.members.push_back(static_cast<int>(i));
  }
  for (Part& part : parts_) {
    part.changed |= changed(part);
    part.brief = part.device.is_cpu() && elements_of(part.problem) < kBriefElements;
    for (std::size_t s = 0; s < part.members.size(); ++s) members_.set_slot(part.members[s], &part.problem.slots[s]);
  }
}

void Engine::apply(const StepSettings& settings) {
  norm_ = norm_of(settings.norm_type);
  TORCH_CHECK_NOT_IMPLEMENTED(settings.group_limits.empty() || parts_.size() == 1,
                              "gradfast: max_norm of a parameter group needs all parameters on one device");
  const UnitClipping units{settings.unit_clipping, settings.unit_eps};
  TORCH_CHECK_VALUE(!clips_units(units) || norm_.kind == NormKind::two, "gradfast: AGC needs norm_type=2, got ",
                    settings.norm_type);
  TORCH_CHECK_NOT_IMPLEMENTED(!clips_units(units) || !settings.clips_updates,
                              "gradfast: update_clipping=True does not take AGC beside it");
  for (Part& part : parts_) {
    part.loss_scale = scalar_on(part.device, settings.loss_scale, "loss_scale");
    part.found_infinite = scalar_on(part.device, settings.found_infinite, "found_infinite");
    part.problem.groups = groups_.groups();
    part.problem.norm = norm_;
    part.problem.clip.element_limit = settings.element_limit;
    part.problem.clip.max_norm = settings.max_norm;
    part.problem.clip.nonfinite = settings.propagate ? NonFinite::propagate : NonFinite::skip;
    part.problem.clip.units = units;
    part.problem.loss_scale = address(part.loss_scale);
    part.problem.rounding_seed = settings.rounding_seed;
    part.problem.clips_updates = settings.clips_updates;
    part.problem.found_infinite = address(part.found_infinite);
    for (std::size_t g = 0; g < settings.group_limits.size(); ++g) {
      part.problem.groups.at(g).max_norm = settings.group_limits[g];
    }
    part.problem.parameter_sums = nullptr;
    part.problem.update_means = nullptr;
    part.problem.clip.policies = settings.policies;
    if (settings.policies.count == 0) continue;
    // Other devices come to the same decision from a copy; what they make of it is thrown away.
    part.policy_state = settings.policy_state.value_or(at::Tensor()).to(part.device);
    part.problem.clip.policies = with_state(settings.policies, part.policy_state);
  }
}

// True if a part's plan must be made anew.
bool Engine::changed(Part& part) const {
  std::vector<int> rules;
  for (const Group& group : groups_.groups()) rules.push_back(group.rule);
  const bool differs = rules != part.previous_rules || part.problem.layouts != part.previous_layouts ||
                       !std::equal(part.problem.slots.begin(), part.problem.slots.end(), part.previous.begin(),
                                   part.previous.end(), same_structure);
  part.previous_rules = std::move(rules);
  return differs;
}

void Engine::run(Part& part, Phase phase, const at::Tensor& total) {
  part.backend->run(part.problem, part.changed, phase, total);
  part.changed = false;
}

void Engine::run_parts(Phase phase, const at::Tensor& total) {
  TORCH_CHECK_VALUE(!total.defined() || total.numel() == 1,
                    "gradfast: the total sum must hold one number, got the shape ",
                    total.defined() ? total.sizes() : at::IntArrayRef{});
  const at::Tensor sum = total.defined() ? total.detach().to(at::kDouble).reshape({}) : at::Tensor();
  for (Part& part : parts_) run(part, phase, sum.defined() ? sum.to(part.device) : sum);
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

std::vector<std::pair<std::vector<int>, at::Tensor>> Engine::update_sums() {
  std::vector<std::pair<std::vector<int>, at::Tensor>> sums;
  for (Part& part : parts_) sums.emplace_back(part.members, part.backend->update_sums());
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

Report Engine::report() { return parts_.empty() ? Report{} : parts_[0].backend->report(); }

at::Tensor Engine::report_bytes() {
  TORCH_CHECK_VALUE(!parts_.empty(), "gradfast: there is no report before the first step");
  return parts_[0].backend->report_bytes();
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

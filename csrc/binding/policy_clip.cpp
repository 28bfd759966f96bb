// Clip policies as a function on gradients.
#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>
#include <pybind11/pybind11.h>

#include <cstddef>

#include "binding/backend_pool.h"
#include "binding/policy_chain.h"
#include "binding/rule_names.h"
#include "binding/slots.h"

namespace gradfast {
namespace {

// The report's flag as a bool tensor on the device.
at::Tensor skipped_flag(Backend& backend) {
  constexpr auto at = static_cast<std::int64_t>(offsetof(Report, skipped));
  return backend.report_bytes().slice(0, at, at + 4).view(at::kInt).reshape({}).to(at::kBool);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> clip_by_policies_(const std::vector<at::Tensor>& gradients,
                                                                 const std::vector<std::optional<at::Tensor>>& weights,
                                                                 const std::vector<int>& numbers,
                                                                 const StepSettings& settings) {
  const pybind11::gil_scoped_release release;
  TORCH_CHECK_VALUE(!gradients.empty() && gradients.size() == numbers.size() && gradients.size() == weights.size(),
                    "gradfast: no gradients to clip");
  const at::Device device = gradients[0].device();
  Problem problem;
  problem.norm = norm_of(settings.norm_type);
  problem.clip.element_limit = settings.element_limit;
  problem.clip.units = {settings.unit_clipping, settings.unit_eps};
  const at::Tensor state = settings.policy_state.value_or(at::Tensor());
  problem.clip.policies = with_state(settings.policies, state);
  TORCH_CHECK_VALUE(state.device() == device, "gradfast: the policies' state must be on ", device.str());
  Group group;
  group.rule = rule_index("clip_gradient");
  problem.groups.push_back(group);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    const std::string name = "parameters[" + std::to_string(numbers[i]) + "].grad";
    check_tensor(gradients[i], "the tensor", name, true);
    if (settings.element_limit != INFINITY) check_ordered(gradients[i], name);
    TORCH_CHECK_VALUE(gradients[i].device() == device, "gradfast: apply_() clips gradients on one device, but ", name,
                      " is on ", gradients[i].device().str(), " and the first on ", device.str(),
                      "; a gradfast optimiser with clip= takes several");
    // Clipping works in place: the gradient is the parameter of the rule, and the weights stand where states would.
    std::vector<at::Tensor> arrays{gradients[i], gradients[i]};
    if (weights[i].has_value()) {
      check_tensor(*weights[i], "the weights", name, false);
      check_match(gradients[i], *weights[i], "the weights", name);
      arrays.push_back(*weights[i]);
    }
    add_slot(arrays, nullptr, 0, name, &problem, {}, weights[i].has_value() ? kFirstState : kNotByUnits);
    problem.slots.back().number = static_cast<std::uint32_t>(numbers[i]);
  }
  BackendLease backend(device);
  backend->run(problem, true, Phase::both, {});
  const at::Tensor skipped = skipped_flag(*backend.operator->());
  for (const at::Tensor& gradient : gradients) {
    if (device.is_cpu()) {
      if (skipped.item<bool>()) gradient.zero_();
    } else {
      gradient.masked_fill_(skipped, 0);
    }
    bump_version(gradient);
  }
  return {backend->norm(), backend->coefficient(), skipped};
}

}  // namespace gradfast

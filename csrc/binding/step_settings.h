// What of a step is the same for all parameter groups, as Python sets it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "rules/policy.h"

namespace gradfast {

struct StepSettings {
  double element_limit = INFINITY;  // as in ClipSettings
  double max_norm = INFINITY;       // infinity: measure but never clip
  double norm_type = 2.0;
  bool propagate = false;  // go on when the norm is NaN or infinite

  // Mixed precision, one float32 element each. The gradients in memory carry the factor `loss_scale`; a nonzero
  // `found_infinite` asks to skip. Read on the device where they live, and copied to the others.
  std::optional<at::Tensor> loss_scale;
  std::optional<at::Tensor> found_infinite;

  // What is rounded by chance: 16-bit parameters without a master, 16-bit states. Not to be changed between steps.
  bool parameters_by_chance = false;
  bool states_by_chance = false;
  std::uint64_t rounding_seed = 0;

  // What acts before the norm is measured: see UnitClipping.
  double unit_clipping = INFINITY;
  double unit_eps = 0;

  // Clip policies, and the tensor that holds their state. It lives on the device of the first parameters.
  PolicyChain policies;
  std::optional<at::Tensor> policy_state;

  // A limit a group for the norm of its own gradients, infinity for none; empty where no group has one.
  std::vector<double> group_limits;
  bool clips_updates = false;  // as in Problem
};

}  // namespace gradfast

// The clip decision of one step: from the global norm to the factor that every gradient is multiplied with.
//
//   coefficient = min(1, max_norm / (norm + 1e-6))           Pascanu, Mikolov, Bengio 2013, algorithm 1
//
// or whatever a chain of clip policies says. With a loss scale s (mixed precision) the gradients in memory are s times
// the true ones: the norm is divided by s before the decision and the factor once more after it, so nobody has to
// rewrite a gradient to unscale it.
#pragma once

#include "rules/agc.h"
#include "rules/chain.h"

namespace gradfast {

enum class NonFinite : int {
  skip,       // a NaN or infinite norm leaves parameters and state as they are
  propagate,  // go on as torch does
};

struct ClipSettings {
  double max_norm = INFINITY;  // infinity: measure but never clip
  NonFinite nonfinite = NonFinite::skip;
  double element_limit = INFINITY;  // every element is clamped to it as it is read, before all else
  UnitClipping units{};             // then units, before the norm is measured
  PolicyChain policies{};           // after max_norm
};

struct ClipDecision {
  double norm;            // of the true (unscaled) gradients, before clipping
  double coefficient;     // in [0, 1]; NaN when the norm is NaN
  double scale;           // what a gradient in memory is multiplied with: coefficient / loss_scale
  double limit;           // what the norm was held to; infinity where it was not
  std::int32_t decider;   // the policy that skipped or clipped, counted from 0; -1: none
  bool skip;              // true: this step changes nothing
  bool each_tensor;       // true: every tensor has a factor of its own, see tensor_scale
  bool reached_policies;  // false: the step was bad before any policy saw it
};

// What the elements of gradients in memory are clamped to. `loss_scale`: null for 1.
GF_HOST_DEVICE double element_limit(const ClipSettings& settings, const float* loss_scale) {
  return loss_scale ? settings.element_limit * static_cast<double>(*loss_scale) : settings.element_limit;
}

GF_HOST_DEVICE ClipDecision decide(const ClipSettings& settings, double measured_norm, double loss_scale,
                                   bool found_infinite) {
  ClipDecision decision;
  decision.norm = measured_norm / loss_scale;
  const bool bad = found_infinite || (settings.nonfinite == NonFinite::skip && !is_finite(decision.norm));
  decision.coefficient = clip_coefficient(settings.max_norm, decision.norm);
  decision.limit = decision.coefficient < 1 ? settings.max_norm : INFINITY;
  decision.decider = -1;
  decision.skip = bad;
  decision.reached_policies = settings.policies.count > 0 && !bad;
  if (decision.reached_policies) {
    const ChainVerdict verdict = run_chain(settings.policies, decision.norm * decision.coefficient, false);
    decision.coefficient *= verdict.coefficient;
    decision.skip = verdict.skip;
    if (verdict.decider >= 0) {
      decision.decider = verdict.decider;
      decision.limit = verdict.limit;
    }
  }
  decision.scale = decision.coefficient / loss_scale;
  decision.each_tensor = decision.reached_policies && clips_each_tensor(settings.policies);
  return decision;
}

// What the gradient of parameter `number` in memory is multiplied with, where its norm there is `measured_norm`.
GF_HOST_DEVICE double tensor_scale(const ClipSettings& settings, const ClipDecision& decision, int number,
                                   double measured_norm) {
  if (!decision.each_tensor) return decision.scale;
  return decision.scale * tensor_coefficient(settings.policies, number, measured_norm * decision.scale);
}

// What the gradients of a parameter group are multiplied with on top, to hold their norm to the group's own limit.
// `measured_norm`: of the group's gradients in memory.
GF_HOST_DEVICE double group_coefficient(const ClipDecision& decision, double limit, double measured_norm) {
  return clip_coefficient(limit, measured_norm * decision.scale);
}

// Brings one parameter's part of the policies' state up to date; before advance_policies.
GF_HOST_DEVICE void advance_tensor(const ClipSettings& settings, const ClipDecision& decision, int number,
                                   double measured_norm) {
  if (!decision.each_tensor || decision.skip || !is_usable(decision.norm)) return;
  advance_tensor(settings.policies, number, measured_norm * decision.scale);
}

// Brings the policies' state up to date, once everyone has decided. For one thread.
GF_HOST_DEVICE void advance_policies(const ClipSettings& settings, const ClipDecision& decision) {
  if (!decision.reached_policies) return;
  run_chain(settings.policies, decision.norm * clip_coefficient(settings.max_norm, decision.norm), true);
}

}  // namespace gradfast

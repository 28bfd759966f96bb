// The clip decision of one step: from the global norm to the factor that every gradient is multiplied with.
//
//   coefficient = min(1, max_norm / (norm + 1e-6))           Pascanu, Mikolov, Bengio 2013, algorithm 1
//
// With a loss scale s (mixed precision) the gradients in memory are s times the true ones: the norm is divided by s
// before the decision and the factor once more after it, so nobody has to rewrite a gradient to unscale it.
#pragma once

#include "rules/precision.h"

namespace gradfast {

enum class NonFinite : int {
  skip,       // a NaN or infinite norm leaves parameters and state as they are
  propagate,  // go on as torch does
};

struct ClipSettings {
  double max_norm = INFINITY;  // infinity: measure but never clip
  NonFinite nonfinite = NonFinite::skip;
};

struct ClipDecision {
  double norm;         // of the true (unscaled) gradients, before clipping
  double coefficient;  // in [0, 1]; NaN when the norm is NaN
  double scale;        // what a gradient in memory is multiplied with: coefficient / loss_scale
  bool skip;           // true: this step changes nothing
};

GF_HOST_DEVICE bool is_finite(double x) { return x - x == 0.0; }

GF_HOST_DEVICE double clip_coefficient(double max_norm, double norm) {
  const double ratio = max_norm / (norm + 1e-6);
  // The comparison is false for NaN, which therefore stays NaN as in torch.clamp. Without a limit the ratio is
  // infinity / norm: 1 for every norm, a NaN or infinite one included.
  return max_norm == INFINITY || ratio > 1.0 ? 1.0 : ratio;
}

GF_HOST_DEVICE ClipDecision decide(const ClipSettings& settings, double measured_norm, double loss_scale,
                                   bool found_infinite) {
  ClipDecision decision;
  decision.norm = measured_norm / loss_scale;
  decision.coefficient = clip_coefficient(settings.max_norm, decision.norm);
  decision.scale = decision.coefficient / loss_scale;
  decision.skip = found_infinite || (settings.nonfinite == NonFinite::skip && !is_finite(decision.norm));
  return decision;
}

}  // namespace gradfast

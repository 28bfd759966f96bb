// AGC (Brock, De, Smith, Simonyan 2021): a unit's gradient is held to a part of the size of the unit's weights.
//
//   G <- G * clipping * max(|W|, eps) / max(|G|, 1e-6)        where |G| > clipping * max(|W|, eps)
//
// A unit is an output: a row of a matrix, a filter of a convolution; a vector or a scalar is one as a whole. `eps` lets
// units that begin at zero train. It acts before the global norm is measured, which therefore is that of what is left:
// the sum of squares of a unit is known when its factor is, and needs no second look at the gradients.
#pragma once

#include "rules/precision.h"

namespace gradfast {

struct UnitClipping {
  double clipping = INFINITY;  // infinity: no unit is clipped
  double eps = 0;
};

GF_HOST_DEVICE bool clips_units(const UnitClipping& units) { return units.clipping != INFINITY; }

// What phase 1 measures of a unit, or of a piece of one: sums of squares.
struct UnitSums {
  double gradients = 0;  // as they are in memory
  double weights = 0;
};

GF_HOST_DEVICE UnitSums join(const UnitSums& a, const UnitSums& b) {
  return {a.gradients + b.gradients, a.weights + b.weights};
}

// What the gradients of a unit are multiplied with. `loss_scale`: the factor that they carry. A unit with a NaN keeps
// it, for the step is then dealt with as one of a norm that is not finite; an infinite gradient becomes NaN.
GF_HOST_DEVICE double unit_factor(const UnitClipping& units, const UnitSums& sums, double loss_scale) {
  const double weight = std::sqrt(sums.weights);
  const double gradient = std::sqrt(sums.gradients) / loss_scale;
  const double limit = units.clipping * (weight < units.eps ? units.eps : weight);
  if (!(gradient > limit)) return 1.0;  // NaN on either side included
  return limit / (gradient > 1e-6 ? gradient : 1e-6);
}

// The sum of squares of a unit's gradients in memory after clipping, or of a piece's.
GF_HOST_DEVICE double clipped_square(const UnitSums& sums, double factor) { return factor * factor * sums.gradients; }

}  // namespace gradfast

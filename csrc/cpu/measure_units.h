// The loop of phase one where units are clipped: gradients and weights of neighbouring units, in one sweep over both.
#pragma once

#include <cstdint>

#include "plan/problem.h"

namespace gradfast::cpu {

// Writes the sums of `count` units of `row_length` elements each, which lie one after the other from both addresses on.
// Gradients are clamped to `limit`.
using MeasureUnitsFunction = void (*)(const void* gradients, const void* weights, std::int64_t row_length,
                                      std::int64_t count, double limit, UnitSums* sums);

// For gradients and weights of one type; null for fp16, which is widened in blocks.
MeasureUnitsFunction measure_units_function(DType dtype);

}  // namespace gradfast::cpu

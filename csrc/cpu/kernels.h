// The two hot loops, as functions over contiguous memory, chosen once for a rule, a dtype and this machine.
#pragma once

#include <cstdint>

#include "plan/problem.h"

namespace gradfast::cpu {

struct Span {
  void* arrays[kMaxArrays];  // parameter, gradient, states: first element of each
  std::int64_t length;       // in elements
};

// Sum of powers (or largest magnitude) of `length` contiguous gradients, each clamped to `limit`.
using MeasureFunction = double (*)(const void* gradients, std::int64_t length, double p, double limit);

MeasureFunction measure_function(NormKind kind, DType dtype);

struct UpdateFunctions {
  // Writes a rule's constants for one tensor to `constants`, kMaxConstantsBytes long.
  void (*prepare)(const PackedHyperparameters&, double step, const ElementClip<double>&, void* constants) = nullptr;
  // Writes them for gradients that are multiplied with `factor` on top.
  void (*rescale)(const void* constants, double factor, void* rescaled) = nullptr;
  void (*update)(const void* constants, const Span&) = nullptr;
  // The sum that update clipping takes the mean of, before the update; null where the rule has none.
  double (*square_updates)(const void* constants, const Span&) = nullptr;
  int arrays = 0;  // how many of Span::arrays it uses

  bool operator==(const UpdateFunctions& other) const { return update == other.update; }
};

// Not for fp16: see mixed.h.
UpdateFunctions update_functions(int rule, DType dtype);

// Number of bytes of an element.
int size_of(DType dtype);

}  // namespace gradfast::cpu

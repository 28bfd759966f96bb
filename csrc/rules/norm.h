// The p-norm of a sequence, as three small functions: add one element, join two partial results, finish.
//
//   p = 1, 2 or any p >= 1:  (sum |x|^p)^(1/p)        p = infinity:  max |x|
//
// Partial results are doubles whatever the gradients' type: the square of the largest float (1e77) is far from
// overflow, the smallest denormal's (1e-90) from underflow, and a sum over billions of elements keeps all the digits
// that a float result can show. A NaN or an infinity among the elements always reaches the result.
#pragma once

#include "rules/precision.h"

namespace gradfast {

struct NormOne {
  static GF_HOST_DEVICE double add(double sum, double x, double) { return sum + std::fabs(x); }
  static GF_HOST_DEVICE double join(double a, double b) { return a + b; }
  static GF_HOST_DEVICE double finish(double sum, double) { return sum; }
};

struct NormTwo {
  static GF_HOST_DEVICE double add(double sum, double x, double) { return sum + x * x; }
  static GF_HOST_DEVICE double join(double a, double b) { return a + b; }
  static GF_HOST_DEVICE double finish(double sum, double) { return std::sqrt(sum); }
};

struct NormInfinity {
  // Written so that a NaN on either side wins, which std::fmax would drop.
  static GF_HOST_DEVICE double join(double a, double b) { return a > b || a != a ? a : b; }
  static GF_HOST_DEVICE double add(double largest, double x, double) { return join(largest, std::fabs(x)); }
  static GF_HOST_DEVICE double finish(double largest, double) { return largest; }
};

struct NormGeneral {
  static GF_HOST_DEVICE double add(double sum, double x, double p) { return sum + std::pow(std::fabs(x), p); }
  static GF_HOST_DEVICE double join(double a, double b) { return a + b; }
  static GF_HOST_DEVICE double finish(double sum, double p) { return std::pow(sum, 1.0 / p); }
};

enum class NormKind : int { one, two, infinity, general };

struct Norm {
  NormKind kind = NormKind::two;
  double p = 2.0;
};

// Calls `function` with the norm's functor, so that a loop over elements is compiled for one kind of norm.
template <class Function>
GF_HOST_DEVICE auto with_norm(NormKind kind, Function&& function) {
  switch (kind) {
    case NormKind::one:
      return function(NormOne{});
    case NormKind::infinity:
      return function(NormInfinity{});
    case NormKind::general:
      return function(NormGeneral{});
    default:
      return function(NormTwo{});
  }
}

GF_HOST_DEVICE double join(const Norm& norm, double a, double b) {
  return norm.kind == NormKind::infinity ? NormInfinity::join(a, b) : a + b;
}

GF_HOST_DEVICE double finish(const Norm& norm, double sum) {
  return with_norm(norm.kind, [&](auto kind) { return decltype(kind)::finish(sum, norm.p); });
}

}  // namespace gradfast

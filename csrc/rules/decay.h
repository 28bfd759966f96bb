// Weight decay of one element: L2 and L1, coupled (added to the gradient) and decoupled (applied to the weight).
//
// A factor of zero must leave no trace, also where p is infinite (0 * inf is NaN): hence the selects, which the
// compiler turns into blends.
#pragma once

#include "rules/precision.h"

namespace gradfast {

template <class A>
GF_HOST_DEVICE A sign_of(A x) {
  return static_cast<A>((x > 0) - (x < 0));
}

// The gradient of  loss + weight_decay / 2 * p^2 + l1 * |p|  given that of the loss.
template <class A>
GF_HOST_DEVICE A add_decay(A g, A p, A weight_decay, A l1) {
  g = weight_decay != 0 ? g + weight_decay * p : g;
  return l1 != 0 && std::fabs(p) > 0 ? g + std::copysign(l1, p) : g;
}

// Decoupled decay (Loshchilov and Hutter 2019): p shrinks by the factor 1 - lr * weight_decay, and by l1's proximal
// step, which moves it lr * l1 towards zero and stops there.
template <class A>
GF_HOST_DEVICE A shrink(A p, A keep, A l1_step) {
  p *= keep;
  const A distance = std::fabs(p) < l1_step ? std::fabs(p) : l1_step;
  return l1_step != 0 ? p - std::copysign(distance, p) : p;
}

}  // namespace gradfast

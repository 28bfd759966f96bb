// What clipping makes of one element of a gradient in memory:
//
//   g <- scale * min(max(g, -limit), limit)          a NaN stays NaN; an infinite limit leaves everything as it is
//
// The limit is that of clipping by value: the loops clamp as they read, for the norm and for the rule. The scale is all
// that clipping by norms comes to, and the loss scale: every rule begins with it. Nobody has to rewrite a gradient.
#pragma once

#include "rules/precision.h"

namespace gradfast {

template <class A>
GF_HOST_DEVICE A clamp(A g, A limit) {
  g = g < -limit ? -limit : g;
  return g > limit ? limit : g;
}

template <class A>
struct ElementClip {
  A limit = static_cast<A>(INFINITY);
  A scale = 1;

  // The same in another type; negated where an objective is maximised.
  template <class B>
  GF_HOST_DEVICE ElementClip<B> as(bool negated = false) const {
    return {static_cast<B>(limit), static_cast<B>(negated ? -scale : scale)};
  }
};

}  // namespace gradfast

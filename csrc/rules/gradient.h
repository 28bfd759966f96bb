// Clipping as an operation on the gradients themselves, for clip_grad_norm_, clip_grad_value_ and clip policies as
// functions. The tensor that is updated is the gradient: `p` and `g` are the same element.
#pragma once

#include "rules/clip_element.h"

namespace gradfast {

struct ClipGradient {
  static constexpr const char* kName = "clip_gradient";
  static constexpr int kStates = 0;

  struct Hyperparameters {
    double unused;
  };

  template <class A>
  struct Constants {
    ElementClip<A> clip;
  };

  template <class A>
  static GF_HOST_DEVICE Constants<A> prepare(const Hyperparameters&, double, const ElementClip<double>& clip) {
    return {clip.as<A>()};
  }

  template <class A>
  static GF_HOST_DEVICE void apply(const Constants<A>& k, A& p, A g, A*) {
    p = k.clip.scale * g;
  }
};

}  // namespace gradfast

// Clipping as an operation on the gradients themselves, for clip_grad_norm_ and clip_grad_value_. The tensor that is
// updated is the gradient: `p` and `g` are the same element.
#pragma once

#include "rules/precision.h"

namespace gradfast {

// g <- scale * g
struct ScaleGradient {
  static constexpr const char* kName = "scale_gradient";
  static constexpr int kStates = 0;

  struct Hyperparameters {
    double unused;
  };

  template <class A>
  struct Constants {
    A gradient_scale;
  };

  template <class A>
  static GF_HOST_DEVICE Constants<A> prepare(const Hyperparameters&, double, double scale) {
    return {static_cast<A>(scale)};
  }

  template <class A>
  static GF_HOST_DEVICE void apply(const Constants<A>& k, A& p, A g, A*) {
    p = k.gradient_scale * g;
  }
};

// g <- min(max(g, -limit), limit); a NaN stays NaN
struct ClampGradient {
  static constexpr const char* kName = "clamp_gradient";
  static constexpr int kStates = 0;

  struct Hyperparameters {
    double limit;
  };

  template <class A>
  struct Constants {
    A limit;
  };

  template <class A>
  static GF_HOST_DEVICE Constants<A> prepare(const Hyperparameters& h, double, double) {
    return {static_cast<A>(h.limit)};
  }

  template <class A>
  static GF_HOST_DEVICE void apply(const Constants<A>& k, A& p, A g, A*) {
    g = g < -k.limit ? -k.limit : g;
    p = g > k.limit ? k.limit : g;
  }
};

}  // namespace gradfast

// Lion for one element (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2):
//
//   g <- scale * g                             (clipping; negated when maximising)
//   c <- beta1 * m + (1 - beta1) * g           the direction, of which only the sign is used
//   p <- shrink(p, 1 - lr * weight_decay, lr * l1) - lr * sign(c)
//   m <- beta2 * m + (1 - beta2) * g           exp_avg
#pragma once

#include "rules/clip_element.h"
#include "rules/decay.h"

namespace gradfast {

struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr int kStates = 1;

  struct Hyperparameters {  // of one parameter group, in the order in which Python passes them
    double lr, beta1, beta2, weight_decay, l1, maximize;
  };

  template <class A>
  struct Constants {
    ElementClip<A> clip;
    A lr, one_minus_beta1, one_minus_beta2, keep, l1_step;
  };

  template <class A>
  static GF_HOST_DEVICE Constants<A> prepare(const Hyperparameters& h, double, const ElementClip<double>& clip) {
    const double keep = 1 - h.lr * h.weight_decay;
    return {clip.as<A>(h.maximize != 0), A(h.lr), A(1 - h.beta1), A(1 - h.beta2), A(keep), A(h.lr * h.l1)};
  }

  template <class A>
  static GF_HOST_DEVICE void apply(const Constants<A>& k, A& p, A g, A* state) {
    g *= k.clip.scale;
    const A c = state[0] + k.one_minus_beta1 * (g - state[0]);
    p = shrink(p, k.keep, k.l1_step) - k.lr * (c != c ? c : sign_of(c));  // NaN must not pass for a zero
    state[0] += k.one_minus_beta2 * (g - state[0]);
  }
};

}  // namespace gradfast

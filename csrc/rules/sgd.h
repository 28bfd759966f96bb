// Stochastic gradient descent with momentum, for one element. Same update as torch.optim.SGD:
//
//   g <- scale * g                     (clipping; negated when maximising)
//   g <- g + weight_decay * p + l1 * sign(p)
//   m <- g                             at the first step
//   m <- momentum * m + (1 - dampening) * g    afterwards
//   p <- p - lr * (nesterov ? g + momentum * m : m)
//
// Momentum as in Sutskever et al. 2013; without it (kMomentum false) no state is read or written.
#pragma once

#include "rules/clip_element.h"
#include "rules/decay.h"

namespace gradfast {

template <bool kMomentum>
struct Sgd {
  static constexpr const char* kName = kMomentum ? "sgd_momentum" : "sgd";
  static constexpr int kStates = kMomentum ? 1 : 0;

  struct Hyperparameters {  // one parameter group; all doubles, in the order in which Python passes them
    double lr, momentum, dampening, nesterov, weight_decay, l1, maximize;
  };

  template <class A>
  struct Constants {  // what is the same for every element of a tensor in a step
    ElementClip<A> clip;
    A lr, momentum, keep, gain, nesterov, weight_decay, l1;
  };

  // `step` counts from 1: the number of updates that this tensor has had, this one included.
  template <class A>
  static GF_HOST_DEVICE Constants<A> prepare(const Hyperparameters& h, double step, const ElementClip<double>& clip) {
    Constants<A> k;
    k.clip = clip.as<A>(h.maximize != 0);
    k.lr = static_cast<A>(h.lr);
    k.momentum = static_cast<A>(h.momentum);
    // The first step takes the gradient undamped: m was created as zero, and 0 * 0 + 1 * g is g exactly.
    k.keep = static_cast<A>(step == 1 ? 0 : h.momentum);
    k.gain = static_cast<A>(step == 1 ? 1 : 1 - h.dampening);
    k.weight_decay = static_cast<A>(h.weight_decay);
    k.l1 = static_cast<A>(h.l1);
    k.nesterov = static_cast<A>(h.nesterov);
    return k;
  }

  template <class A>
  static GF_HOST_DEVICE void apply(const Constants<A>& k, A& p, A g, A* state) {
    g = add_decay(g * k.clip.scale, p, k.weight_decay, k.l1);
    A update = g;
    if constexpr (kMomentum) {
      const A m = k.keep * state[0] + k.gain * g;
      state[0] = m;
      update = k.nesterov != 0 ? g + k.momentum * m : m;
    }
    p -= k.lr * update;
  }
};

}  // namespace gradfast

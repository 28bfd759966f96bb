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
    A gradient_scale, lr, momentum, one_minus_dampening, weight_decay, l1;
    bool nesterov, first_step;
  };

  // `step` counts from 1: the number of updates that this tensor has had, this one included.
  template <class A>
  static GF_HOST_DEVICE Constants<A> prepare(const Hyperparameters& h, double step, double scale) {
    Constants<A> k;
    k.gradient_scale = static_cast<A>(h.maximize != 0 ? -scale : scale);
    k.lr = static_cast<A>(h.lr);
    k.momentum = static_cast<A>(h.momentum);
    k.one_minus_dampening = static_cast<A>(1 - h.dampening);
    k.weight_decay = static_cast<A>(h.weight_decay);
    k.l1 = static_cast<A>(h.l1);
    k.nesterov = h.nesterov != 0;
    k.first_step = step == 1;
    return k;
  }

  template <class A>
  static GF_HOST_DEVICE void apply(const Constants<A>& k, A& p, A g, A* state) {
    g = add_decay(g * k.gradient_scale, p, k.weight_decay, k.l1);
    A update = g;
    if constexpr (kMomentum) {
      const A m = k.first_step ? g : k.momentum * state[0] + k.one_minus_dampening * g;
      state[0] = m;
      update = k.nesterov ? g + k.momentum * m : m;
    }
    p -= k.lr * update;
  }
};

}  // namespace gradfast

// Adam and AdamW for one element. Same update as torch.optim.Adam / AdamW; t is the tensor's step count:
//
//   g <- scale * g                                (clipping; negated when maximising)
//   coupled:    g <- g + weight_decay * p + l1 * sign(p)                       Kingma and Ba 2015 with L2
//   decoupled:  p <- shrink(p, 1 - lr * weight_decay, lr * l1)                 Loshchilov and Hutter 2019
//   m <- m + (1 - beta1) * (g - m)                exp_avg
//   v <- beta2 * v + (1 - beta2) * g^2            exp_avg_sq
//   u <- v, or max(u, v) with AMSGrad             max_exp_avg_sq, Reddi, Kale, Kumar 2018
//   p <- p - lr / (1 - beta1^t) * m / (sqrt(u) / sqrt(1 - beta2^t) + eps)
#pragma once

#include "rules/clip_element.h"
#include "rules/decay.h"

namespace gradfast {

// Update clipping: what a tensor's learning rate is multiplied with, 1 / max(1, RMS), where RMS^2 is `mean_square`.
// NaN, of gradients that are zero for ever with eps = 0, clips nothing.
GF_HOST_DEVICE double rate_for_updates(double mean_square) {
  return mean_square > 1 ? 1 / std::sqrt(mean_square) : 1.0;
}

template <bool kAmsgrad>
struct Adam {
  static constexpr const char* kName = kAmsgrad ? "adam_amsgrad" : "adam";
  static constexpr int kStates = kAmsgrad ? 3 : 2;

  struct Hyperparameters {  // one parameter group; all doubles, in the order in which Python passes them
    double lr, beta1, beta2, eps, weight_decay, l1, decoupled, maximize;
  };

  template <class A>
  struct Constants {  // what is the same for every element of a tensor in a step
    ElementClip<A> clip;
    A to_gradient, from_gradient, beta2, one_minus_beta2, step_size, inverse_sqrt_correction, eps;
    A coupled_decay, coupled_l1, keep, l1_step;
  };

  template <class A>
  static GF_HOST_DEVICE Constants<A> prepare(const Hyperparameters& h, double step, const ElementClip<double>& clip) {
    const bool decoupled = h.decoupled != 0;
    Constants<A> k;
    k.clip = clip.as<A>(h.maximize != 0);
    // m is reached from the nearer end, as torch.lerp does: with beta1 = 0 it is g exactly, however large m was.
    const bool near_gradient = h.beta1 <= 0.5;
    k.to_gradient = static_cast<A>(near_gradient ? -h.beta1 : 1 - h.beta1);
    k.from_gradient = static_cast<A>(near_gradient);
    k.beta2 = static_cast<A>(h.beta2);
    k.one_minus_beta2 = static_cast<A>(1 - h.beta2);
    k.step_size = static_cast<A>(h.lr / (1 - std::pow(h.beta1, step)));
    k.inverse_sqrt_correction = static_cast<A>(1 / std::sqrt(1 - std::pow(h.beta2, step)));
    k.eps = static_cast<A>(h.eps);
    k.coupled_decay = static_cast<A>(decoupled ? 0 : h.weight_decay);
    k.coupled_l1 = static_cast<A>(decoupled ? 0 : h.l1);
    k.keep = static_cast<A>(decoupled ? 1 - h.lr * h.weight_decay : 1);
    k.l1_step = static_cast<A>(decoupled ? h.lr * h.l1 : 0);
    return k;
  }

  template <class A>
  static GF_HOST_DEVICE void apply(const Constants<A>& k, A& p, A g, A* state) {
    g = add_decay(g * k.clip.scale, p, k.coupled_decay, k.coupled_l1);
    p = shrink(p, k.keep, k.l1_step);
    const A m = (k.from_gradient != 0 ? g : state[0]) + k.to_gradient * (g - state[0]);
    const A v = k.beta2 * state[1] + k.one_minus_beta2 * g * g;
    state[0] = m;
    state[1] = v;
    A u = v;
    if constexpr (kAmsgrad) {
      u = v > state[2] || v != v ? v : state[2];  // NaN wins, as in torch.maximum
      state[2] = u;
    }
    p -= k.step_size * (m / (std::sqrt(u) * k.inverse_sqrt_correction + k.eps));
  }

  // What update clipping (StableAdamW, Wortsman et al. 2023) takes the mean of, with the v that this step will leave:
  //
  //   RMS^2 = (1 - beta2^t) * mean(g^2 / max(v, eps^2))          lr <- lr / max(1, RMS), of each parameter
  template <class A>
  static GF_HOST_DEVICE A squared_update(const Constants<A>& k, A g, A v) {
    g *= k.clip.scale;
    v = k.beta2 * v + k.one_minus_beta2 * g * g;
    const A floor = k.eps * k.eps;
    return g * g / (v > floor ? v : floor);
  }
  template <class A>
  static GF_HOST_DEVICE double squared_update_factor(const Constants<A>& k) {
    return 1.0 / (static_cast<double>(k.inverse_sqrt_correction) * k.inverse_sqrt_correction);
  }
};

}  // namespace gradfast

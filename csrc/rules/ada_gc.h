// AdaGC (Wang et al. 2025): each parameter's gradient is held to what its norm has been lately.
//
//   first `warmup` steps     h = min(1, max_norm / |g|) for all;        gamma_i <- min(gamma_i, h |g_i|)
//   then                     h_i = min(1, ratio * gamma_i / |g_i|);     gamma_i <- beta gamma_i + (1 - beta) h_i |g_i|
//
// A gradient of zero says nothing about a parameter's scale and leaves gamma as it is: with the paper's minimum a
// parameter that once had none would never move again. One whose first gradient comes after the warm-up begins there.
#pragma once

#include "rules/policy.h"

namespace gradfast {

struct AdaGC {
  static constexpr const char* kName = "ada_gc";
  static constexpr int kValues = 4;  // ratio, beta, max_norm, warmup; the window is the number of parameters
  static constexpr bool kEachTensor = true;
  enum State { kCount, kGamma };
  static constexpr int state_size(int parameters) { return kGamma + parameters; }

  static GF_HOST_DEVICE bool warming_up(const Policy& policy, const double* state) {
    return state[kCount] < policy.values[3];
  }

  static GF_HOST_DEVICE Verdict judge(const Policy& policy, const double* state, double) {
    return warming_up(policy, state) ? Verdict{policy.values[2], false} : Verdict{};
  }

  static GF_HOST_DEVICE void advance(const Policy&, double* state, double, const Verdict&) { state[kCount] += 1; }

  // `norm`: of parameter `number` after all clipping by the global norm.
  static GF_HOST_DEVICE double tensor_coefficient(const Policy& policy, const double* state, int number, double norm) {
    const double limit = policy.values[0] * state[kGamma + number];
    return warming_up(policy, state) || limit == 0 || !(norm > limit) ? 1.0 : limit / norm;
  }

  static GF_HOST_DEVICE void advance_tensor(const Policy& policy, double* state, int number, double norm) {
    if (!(norm > 0)) return;
    double& gamma = state[kGamma + number];
    if (gamma == 0) {
      gamma = norm;
    } else if (warming_up(policy, state)) {
      gamma = norm < gamma ? norm : gamma;
    } else {
      gamma = policy.values[1] * gamma + (1 - policy.values[1]) * norm;
    }
  }
};

}  // namespace gradfast

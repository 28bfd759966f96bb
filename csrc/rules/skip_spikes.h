// Skips a step whose norm stands out from those before it, as OLMo does (Groeneveld et al. 2024, OLMo 2 2025):
//
//   limit = mean + sigmas * sd        over the last `window` norms, once this one is the (window / 2)th; sd with n - 1
//   skip    if norm > limit
//
// In OLMo the spike itself enters the window and hides the next ones: a norm of 1000 among 127 of 1 makes the limit
// 540. Here a spike enters as max(limit, 2 * mean) at most. That still grows exponentially where the norms stay high,
// so that training for good at another level is skipped a few dozen times and then goes on. `exact` does as OLMo.
#pragma once

#include "rules/policy.h"

namespace gradfast {

struct SkipSpikes {
  static constexpr const char* kName = "skip_spikes";
  static constexpr int kValues = 2;  // sigmas, exact
  static constexpr bool kEachTensor = false;
  enum State { kCount, kNext, kMean, kDeviation, kRing };
  static constexpr int state_size(int window) { return kRing + window; }

  static GF_HOST_DEVICE Verdict judge(const Policy& policy, const double* state, double norm) {
    const int enough = policy.window / 2 > 3 ? policy.window / 2 - 1 : 2;  // before this one; two have a deviation
    if (state[kCount] < enough) return {};
    const double limit = state[kMean] + policy.values[0] * state[kDeviation];
    return norm > limit ? Verdict{limit, true} : Verdict{};
  }

  static GF_HOST_DEVICE void advance(const Policy& policy, double* state, double norm, const Verdict& verdict) {
    if (verdict.skip && policy.values[1] == 0) {
      const double cap = verdict.limit > 2 * state[kMean] ? verdict.limit : 2 * state[kMean];
      norm = norm < cap ? norm : cap;
    }
    double* ring = state + kRing;
    const int next = static_cast<int>(state[kNext]);
    const int count = state[kCount] < policy.window ? static_cast<int>(state[kCount]) + 1 : policy.window;
    ring[next] = norm;
    state[kNext] = next + 1 == policy.window ? 0 : next + 1;
    state[kCount] = count;
    // Anew from all samples: no error adds up over millions of steps, and the next judge reads two numbers.
    double sum = 0, squares = 0;
    for (int i = 0; i < count; ++i) sum += ring[i];
    const double mean = sum / count;
    for (int i = 0; i < count; ++i) squares += (ring[i] - mean) * (ring[i] - mean);
    state[kMean] = mean;
    state[kDeviation] = count > 1 ? std::sqrt(squares / (count - 1)) : 0;
  }
};

}  // namespace gradfast

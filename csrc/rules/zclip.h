// ZClip (Kumar, Owen, Chowdhury, Guera 2025): clips a norm whose z-score is high, harder the higher it is.
//
//   warm-up    the first `warmup` norms make mean and variance (divided by warmup)
//   z      =   (norm - mean) / (sd + 1e-6)
//   limit  =   mean + z_limit * sd / (z / z_limit)          where z > z_limit; else none
//   mean   <-  alpha * mean + (1 - alpha) * min(norm, limit)
//   var    <-  alpha * var + (1 - alpha) * (min(norm, limit) - mean)^2          with the new mean
//
// A spike in the warm-up would widen sd for hundreds of steps, and the paper lets it through. Here, from the fifth norm
// on, one above  max(median + 6 * 1.4826 * MAD, 2 * median)  of those so far is clipped to that, and at the end of the
// warm-up no sample counts for more. A warm-up without such a spike gives the paper's numbers.
#pragma once

#include "rules/policy.h"
#include "rules/sorted.h"

namespace gradfast {

struct ZClip {
  static constexpr const char* kName = "zclip";
  static constexpr int kValues = 2;  // z_limit, alpha
  static constexpr bool kEachTensor = false;
  static constexpr int kEnough = 5;
  enum State { kCount, kMean, kVariance, kOutlier, kSorted };  // kOutlier: the limit in the warm-up
  static constexpr int state_size(int warmup) { return kSorted + warmup; }

  static GF_HOST_DEVICE Verdict judge(const Policy& policy, const double* state, double norm) {
    if (state[kCount] < policy.window) {
      return {state[kCount] < kEnough ? INFINITY : state[kOutlier], false};
    }
    const double z_limit = policy.values[0], mean = state[kMean], deviation = std::sqrt(state[kVariance]);
    const double z = (norm - mean) / (deviation + 1e-6);
    return {z > z_limit ? mean + z_limit * deviation / (z / z_limit) : INFINITY, false};
  }

  static GF_HOST_DEVICE void advance(const Policy& policy, double* state, double norm, const Verdict& verdict) {
    const double sample = norm < verdict.limit ? norm : verdict.limit;
    if (state[kCount] < policy.window) return warm_up(policy, state, sample);
    const double alpha = policy.values[1];
    state[kMean] = alpha * state[kMean] + (1 - alpha) * sample;
    const double distance = sample - state[kMean];
    state[kVariance] = alpha * state[kVariance] + (1 - alpha) * distance * distance;
  }

 private:
  static GF_HOST_DEVICE void warm_up(const Policy& policy, double* state, double sample) {
    double* sorted = state + kSorted;
    insert(sorted, static_cast<int>(state[kCount]), sample);
    state[kCount] += 1;
    const int count = static_cast<int>(state[kCount]);
    const double median = median_of(sorted, count);
    const double spread = median + 6 * 1.4826 * median_deviation(sorted, count, median);
    const double outlier = spread > 2 * median ? spread : 2 * median;
    state[kOutlier] = outlier;
    if (count < policy.window) return;
    const auto capped = [&](int i) { return count >= kEnough && sorted[i] > outlier ? outlier : sorted[i]; };
    double sum = 0, squares = 0;
    for (int i = 0; i < count; ++i) sum += capped(i);
    const double mean = sum / count;
    for (int i = 0; i < count; ++i) squares += (capped(i) - mean) * (capped(i) - mean);
    state[kMean] = mean;
    state[kVariance] = squares / count;
  }
};

}  // namespace gradfast

// AutoClip (Seetharaman, Wichern, Pardo, Le Roux 2020): the limit is a percentile of the norms seen so far.
//
//   limit = percentile_p of the last `window` norms, this one included; between two of them, linearly
//
// The paper remembers all norms of a run; here `window` bounds them. They are kept twice, in the order in which they
// came and sorted, so that a percentile costs a binary search and no sort: judge looks at the sorted samples as they
// will be, one of them gone and the new one in its place.
#pragma once

#include "rules/policy.h"
#include "rules/sorted.h"

namespace gradfast {

struct AutoClip {
  static constexpr const char* kName = "auto_clip";
  static constexpr int kValues = 1;  // percentile, 0 to 100
  static constexpr bool kEachTensor = false;
  enum State { kCount, kNext, kSorted };
  static constexpr int state_size(int window) { return kSorted + 2 * window; }

  static GF_HOST_DEVICE Verdict judge(const Policy& policy, const double* state, double norm) {
    const double* sorted = state + kSorted;
    const int count = static_cast<int>(state[kCount]);
    const bool full = count == policy.window;
    const double oldest = sorted[policy.window + static_cast<int>(state[kNext])];
    const int gone = full ? rank_of(sorted, count, oldest) : count;
    const int remaining = full ? count - 1 : count;
    const auto old = [&](int i) { return sorted[i < gone ? i : i + 1]; };
    int place = rank_of(sorted, count, norm);
    if (full && oldest < norm) --place;
    const auto at = [&](int i) { return i < place ? old(i) : i == place ? norm : old(i - 1); };
    const double position = policy.values[0] / 100 * remaining;
    const int below = static_cast<int>(position);
    const int above = below < remaining ? below + 1 : below;
    const double low = at(below);
    return {position > below ? low + (position - below) * (at(above) - low) : low, false};
  }

  static GF_HOST_DEVICE void advance(const Policy& policy, double* state, double norm, const Verdict&) {
    double* sorted = state + kSorted;
    const int next = static_cast<int>(state[kNext]);
    int count = static_cast<int>(state[kCount]);
    double* oldest = sorted + policy.window + next;
    if (count == policy.window) remove(sorted, count--, *oldest);
    insert(sorted, count, norm);
    *oldest = norm;
    state[kNext] = next + 1 == policy.window ? 0 : next + 1;
    state[kCount] = count + 1;
  }
};

}  // namespace gradfast

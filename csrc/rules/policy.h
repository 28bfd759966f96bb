// What a clip policy is: a rule  (norm, state) -> (limit, skip, state')  decided once a step, from the global norm.
//
// A policy is a struct of static functions over a `Policy`, its settings, and a span of doubles, its state:
//
//   judge    reads the state and says what to do with a step of this norm; every block of a GPU comes to the same
//   advance  writes the state that the next step sees; one thread does it, after everyone has judged
//
// One with kEachTensor clips every parameter's gradient on top, by the norm of that alone; it ends a chain:
//
//   tensor_coefficient   the factor for one parameter, from what is left of its norm after the policies before
//   advance_tensor       writes the state of that parameter, from what is left of its norm after all clipping; before
//                        advance
//
// The state of all policies of an optimiser is one array of doubles in the memory of the device, all zero at first, so
// that it is copied, saved and replayed in a graph as any tensor is. Norms are those of the true (unscaled) gradients.
// A sample that is not finite never enters a state: see `is_usable`; nor does one of zero: see `run_chain`.
#pragma once

#include "rules/precision.h"

namespace gradfast {

inline constexpr int kMaxPolicies = 4;  // of one chain
inline constexpr int kMaxPolicyValues = 4;

struct Policy {
  std::int32_t kind = 0;    // index into Policies
  std::int32_t window = 0;  // how many samples it remembers; 0 where it remembers none
  std::int32_t state = 0;   // where its state begins, in doubles
  std::int32_t unused = 0;
  double values[kMaxPolicyValues] = {};  // its settings, in the order in which Python passes them
};

struct PolicyChain {
  Policy policies[kMaxPolicies];
  double* state = nullptr;  // of all policies, in the memory of the device
  std::int32_t count = 0;
  std::int32_t unused = 0;
};

struct Verdict {
  double limit = INFINITY;  // the norm is clipped to that
  bool skip = false;        // leave this step out: the norm is above the limit
};

GF_HOST_DEVICE bool is_finite(double x) { return x - x == 0.0; }

// True for a norm that may enter a state: finite, and its square as well.
GF_HOST_DEVICE bool is_usable(double norm) { return norm >= 0 && norm < 1e150; }

// The factor that brings `norm` down to `limit`:  min(1, limit / (norm + 1e-6))  (Pascanu, Mikolov, Bengio 2013).
GF_HOST_DEVICE double clip_coefficient(double limit, double norm) {
  const double ratio = limit / (norm + 1e-6);
  // The comparison is false for NaN, which therefore stays NaN as in torch.clamp. Without a limit the ratio is
  // infinity / norm: 1 for every norm, a NaN or infinite one included.
  return limit == INFINITY || ratio > 1.0 ? 1.0 : ratio;
}

// The limit that the user gives.
struct GlobalNorm {
  static constexpr const char* kName = "global_norm";
  static constexpr int kValues = 1;  // max_norm
  static constexpr bool kEachTensor = false;
  static constexpr int state_size(int) { return 0; }

  static GF_HOST_DEVICE Verdict judge(const Policy& policy, const double*, double) { return {policy.values[0], false}; }
  static GF_HOST_DEVICE void advance(const Policy&, double*, double, const Verdict&) {}
};

}  // namespace gradfast

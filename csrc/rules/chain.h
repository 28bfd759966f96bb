// Clip policies one after the other: each sees the norm that those before it let through.
//
// A policy that skips ends the chain: the step is left out, and the policies behind it never hear of it. A norm that is
// not finite, or zero, changes no state.
#pragma once

#include "rules/ada_gc.h"
#include "rules/auto_clip.h"
#include "rules/parameter_norm.h"
#include "rules/policy.h"
#include "rules/skip_spikes.h"
#include "rules/zclip.h"

namespace gradfast {

template <class... Policy>
struct PolicyList {};

// Every policy. A new one adds its header and its name here, and all backends have it.
using Policies = PolicyList<GlobalNorm, SkipSpikes, ZClip, AutoClip, ParameterNorm, AdaGC>;

// Calls `function` with the struct of policy number `kind`.
template <class Function, class First, class... Rest>
GF_HOST_DEVICE auto with_policy(PolicyList<First, Rest...>, int kind, Function&& function) {
  if constexpr (sizeof...(Rest) == 0) {
    return function(First{});
  } else {
    return kind == 0 ? function(First{}) : with_policy(PolicyList<Rest...>{}, kind - 1, function);
  }
}

struct ChainVerdict {
  double coefficient = 1;     // of all policies together
  double limit = INFINITY;    // of the policy that decided
  std::int32_t decider = -1;  // the one that skipped, or else the last that clipped; -1: none
  bool skip = false;
};

// Asks the policies in order. With `advance` the state is brought up to date on the way, each policy's after its
// verdict: that is for the one thread that writes. A norm of zero asks nobody: there is nothing to clip in it, and a
// state made of zeros would hold all that follows at zero.
GF_HOST_DEVICE ChainVerdict run_chain(const PolicyChain& chain, double norm, bool advance) {
  ChainVerdict result;
  if (norm == 0) return result;
  advance = advance && is_usable(norm);
  GF_NO_UNROLL
  for (int i = 0; i < chain.count && !result.skip; ++i) {
    const Policy& policy = chain.policies[i];
    double* state = chain.state + policy.state;
    const Verdict verdict = with_policy(Policies{}, policy.kind, [&](auto kind) {
      const Verdict judged = decltype(kind)::judge(policy, state, norm);
      if (advance) decltype(kind)::advance(policy, state, norm, judged);
      return judged;
    });
    const double coefficient = clip_coefficient(verdict.limit, norm);
    result.skip = verdict.skip;
    if (verdict.skip || coefficient < 1) {
      result.decider = i;
      result.limit = verdict.limit;
    }
    if (verdict.skip) break;
    result.coefficient *= coefficient;
    norm *= coefficient;
  }
  return result;
}

// True where the last policy clips every parameter's gradient by itself.
GF_HOST_DEVICE bool clips_each_tensor(const PolicyChain& chain) {
  return chain.count > 0 && with_policy(Policies{}, chain.policies[chain.count - 1].kind,
                                        [](auto kind) { return decltype(kind)::kEachTensor; });
}

// What that policy makes of parameter `number`, of which the global clipping left `norm`.
GF_HOST_DEVICE double tensor_coefficient(const PolicyChain& chain, int number, double norm) {
  const Policy& policy = chain.policies[chain.count - 1];
  return with_policy(Policies{}, policy.kind, [&](auto kind) {
    if constexpr (decltype(kind)::kEachTensor) {
      return decltype(kind)::tensor_coefficient(policy, chain.state + policy.state, number, norm);
    } else {
      return 1.0;
    }
  });
}

// Brings the state of parameter `number` up to date. For one thread, after everyone has asked for its coefficient.
GF_HOST_DEVICE void advance_tensor(const PolicyChain& chain, int number, double norm) {
  if (!is_usable(norm)) return;
  const double left = norm * tensor_coefficient(chain, number, norm);
  const Policy& policy = chain.policies[chain.count - 1];
  with_policy(Policies{}, policy.kind, [&](auto kind) {
    if constexpr (decltype(kind)::kEachTensor) {
      decltype(kind)::advance_tensor(policy, chain.state + policy.state, number, left);
    }
  });
}

}  // namespace gradfast

#include "binding/policy_chain.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace gradfast {
namespace {

struct PolicyInfo {
  const char* name;
  int values;
  int (*state_size)(int window);
};

template <class... Each>
const PolicyInfo* infos(PolicyList<Each...>) {
  static constexpr PolicyInfo all[] = {{Each::kName, Each::kValues, &Each::state_size}...};
  return all;
}

template <class... Each>
constexpr int count(PolicyList<Each...>) {
  return sizeof...(Each);
}

int kind_of(const std::string& name) {
  for (int kind = 0; kind < count(Policies{}); ++kind) {
    if (name == infos(Policies{})[kind].name) return kind;
  }
  TORCH_CHECK_VALUE(false, "gradfast: no clip policy is called '", name, "'");
}

}  // namespace

PolicyChain chain_of(const std::vector<PolicySettings>& settings) {
  TORCH_CHECK_VALUE(settings.size() <= kMaxPolicies, "gradfast: a chain holds at most ", kMaxPolicies,
                    " clip policies, got ", settings.size());
  PolicyChain chain;
  for (const auto& [name, window, values] : settings) {
    Policy policy;
    policy.kind = kind_of(name);
    const PolicyInfo& info = infos(Policies{})[policy.kind];
    TORCH_CHECK_VALUE(window >= 0 && static_cast<int>(values.size()) == info.values, "gradfast: clip policy '", name,
                      "' takes a window and ", info.values, " values, got ", window, " and ", values.size());
    policy.window = window;
    policy.state = static_cast<std::int32_t>(state_size(chain));
    std::copy(values.begin(), values.end(), policy.values);
    chain.policies[chain.count++] = policy;
  }
  return chain;
}

std::int64_t state_size(const PolicyChain& chain) {
  if (chain.count == 0) return 0;
  const Policy& last = chain.policies[chain.count - 1];
  return last.state + infos(Policies{})[last.kind].state_size(last.window);
}

PolicyChain with_state(PolicyChain chain, const at::Tensor& state) {
  TORCH_CHECK_VALUE(state.defined() && state.scalar_type() == at::kDouble && state.is_contiguous() &&
                        state.numel() == state_size(chain),
                    "gradfast: the state of these clip policies is a dense float64 tensor of ", state_size(chain),
                    " elements");
  chain.state = state.data_ptr<double>();
  return chain;
}

std::vector<at::Tensor> run_chain_over(const PolicyChain& chain, const at::Tensor& state, const at::Tensor& norms) {
  TORCH_CHECK_VALUE(norms.scalar_type() == at::kDouble && norms.is_contiguous() && norms.is_cpu() && state.is_cpu(),
                    "gradfast: the norms and the state must be dense float64 tensors on the CPU");
  const PolicyChain stateful = with_state(chain, state);
  at::Tensor coefficients = at::empty_like(norms), limits = at::empty_like(norms);
  at::Tensor deciders = at::empty(norms.sizes(), at::kInt), skipped = at::empty(norms.sizes(), at::kBool);
  for (std::int64_t i = 0; i < norms.numel(); ++i) {
    const ChainVerdict verdict = run_chain(stateful, norms.const_data_ptr<double>()[i], true);
    coefficients.data_ptr<double>()[i] = verdict.coefficient;
    limits.data_ptr<double>()[i] = verdict.limit;
    deciders.data_ptr<std::int32_t>()[i] = verdict.decider;
    skipped.data_ptr<bool>()[i] = verdict.skip;
  }
  return {coefficients, limits, deciders, skipped};
}

at::Tensor parameter_coefficients(const PolicyChain& chain, const at::Tensor& state, const at::Tensor& norms) {
  TORCH_CHECK_VALUE(norms.scalar_type() == at::kDouble && norms.is_contiguous() && norms.is_cpu() && state.is_cpu(),
                    "gradfast: the norms and the state must be dense float64 tensors on the CPU");
  const PolicyChain stateful = with_state(chain, state);
  at::Tensor coefficients = at::ones_like(norms);
  if (!clips_each_tensor(stateful)) return coefficients;
  const int known = stateful.policies[stateful.count - 1].window;  // 0 where nothing is remembered of parameters
  TORCH_CHECK_VALUE(known == 0 || norms.numel() == known, "gradfast: these clip policies were made for ", known,
                    " parameters, got ", norms.numel(), " norms");
  for (std::int64_t i = 0; i < norms.numel(); ++i) {
    coefficients.data_ptr<double>()[i] =
        tensor_coefficient(stateful, static_cast<int>(i), norms.const_data_ptr<double>()[i]);
  }
  return coefficients;
}

}  // namespace gradfast

// Clip policies by the names and numbers that Python uses.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding/step_settings.h"
#include "rules/chain.h"

namespace gradfast {

// One policy: its name, its window (0 where it remembers no samples), and its values in the order of its struct.
using PolicySettings = std::tuple<std::string, int, std::vector<double>>;

// The chain of these policies, each with its place in one array of state_size() doubles.
PolicyChain chain_of(const std::vector<PolicySettings>& settings);

// How many doubles the state of all policies takes; at first they are zero.
std::int64_t state_size(const PolicyChain& chain);

// The chain with its state in `state`, a dense double tensor of state_size() elements that outlives its use.
PolicyChain with_state(PolicyChain chain, const at::Tensor& state);

// Runs the chain on the host over one norm after the other, as so many steps would, and brings `state` up to date.
// Returns, a norm each: the coefficient (double), the limit (double), the decider (int, -1: none), skipped (bool).
std::vector<at::Tensor> run_chain_over(const PolicyChain& chain, const at::Tensor& state, const at::Tensor& norms);

// What the chain multiplies each parameter's gradient with by itself, on top of what holds for all, worked out on the
// host. `state`: from before the step. `norms`: of each parameter, as the clipping of the global norm left them.
at::Tensor parameter_coefficients(const PolicyChain& chain, const at::Tensor& state, const at::Tensor& norms);

// Clips `gradients`, all on one device, in place; zeroes them where the step is to be skipped. `weights`: of each
// gradient whose units AGC clips. `numbers`: of each gradient's parameter among all. Of `settings` norm, policies and
// what acts before the norm count. Returns norm and coefficient (0-d double) and skipped (0-d bool); nothing waits.
std::tuple<at::Tensor, at::Tensor, at::Tensor> clip_by_policies_(const std::vector<at::Tensor>& gradients,
                                                                 const std::vector<std::optional<at::Tensor>>& weights,
                                                                 const std::vector<int>& numbers,
                                                                 const StepSettings& settings);

}  // namespace gradfast

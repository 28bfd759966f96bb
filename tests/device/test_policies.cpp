// Clip policies on the device: decided from the old state by every block, written once, whatever happens to the step.
//
// That the rules say what the papers say is tested in tests/clip/, against float64 oracles over long sequences; here
// the same rules run on the host beside the device.
#include <cmath>
#include <string>

#include "cases.h"
#include "devices.h"
#include "model.h"

namespace test {
namespace {

using gradfast::AutoClip;
using gradfast::Phase;
using gradfast::Policy;
using gradfast::PolicyChain;
using gradfast::SkipSpikes;
using gradfast::ZClip;
using gradfast::cuda::Stepper;

enum Kind {
  kGlobalNorm,
  kSkipSpikes,
  kZClip,
  kAutoClip,
  kParameterNorm,
  kAdaGC
};  // in the order of gradfast::Policies

// A chain of all policies, with windows so short that every branch is taken within thirty steps.
PolicyChain all_policies() {
  PolicyChain chain;
  int state = 0;
  const auto add = [&](Kind kind, int window, int state_size, std::initializer_list<double> values) {
    Policy& policy = chain.policies[chain.count++];
    policy.kind = kind;
    policy.window = window;
    policy.state = state;
    std::copy(values.begin(), values.end(), policy.values);
    state += state_size;
  };
  add(kSkipSpikes, 8, SkipSpikes::state_size(8), {6, 0});
  add(kZClip, 6, ZClip::state_size(6), {2.5, 0.9});
  add(kAutoClip, 10, AutoClip::state_size(10), {50});
  add(kGlobalNorm, 0, 0, {0.8});
  return chain;
}

// Two that clip each tensor by itself, behind one for the whole.
PolicyChain each_tensor(Kind last) {
  PolicyChain chain;
  chain.policies[0].kind = kSkipSpikes;
  chain.policies[0].window = 8;
  chain.policies[0].values[0] = 6;
  chain.policies[1].kind = last;
  chain.policies[1].state = SkipSpikes::state_size(8);
  chain.policies[1].window = 6;  // parameters
  const double ada_gc[] = {1.05, 0.9, 0.5, 5};
  std::copy_n(ada_gc, 4, chain.policies[1].values);
  if (last == kParameterNorm) chain.policies[1].values[0] = 0.3;
  chain.count = 2;
  return chain;
}

// A model under a chain of policies, and the same chain on the host.
class Policed {
 public:
  explicit Policed(const PolicyChain& chain) : model_(5), device_(kDoubles * sizeof(double)), host_(kDoubles) {
    model_.add_group(kAdam, {0.01, 0.9, 0.99, 1e-3, 0.02, 0, 1, 0});
    for (const std::int64_t size : {20000, 3, 4096, 9001, 0, 511}) model_.add(vector_of(size), DType::float32, 0);
    device_.upload();
    // Numbers in another order than the tensors: states and factors go by the number.
    for (std::size_t t = 0; t < model_.tensors(); ++t) model_.problem().slots[t].number = 5 - t;
    model_.clip.policies = chain;
    model_.clip.policies.state = reinterpret_cast<double*>(device_.device);
  }

  Model& model() { return model_; }

  // New gradients of about `size` times the usual norm; returns what the host's chain makes of them.
  gradfast::ChainVerdict prepare(double size, bool nan) {
    model_.largest_gradient = size * model_.loss_scale / 100;
    model_.fill_gradients();
    if (nan) model_.set_gradient(2, 77, NAN);
    model_.remember();
    const double norm = std::sqrt(model_.expected_sum()) / model_.loss_scale;
    PolicyChain chain = model_.clip.policies;
    chain.state = host_.data();
    const bool bad = !std::isfinite(norm) || model_.found_infinite;
    gradfast::ChainVerdict verdict;
    if (!bad) verdict = gradfast::run_chain(chain, norm, false);
    model_.tensor_coefficients.clear();
    for (std::size_t t = 0; t < model_.tensors() && gradfast::clips_each_tensor(chain) && !bad; ++t) {
      const int number = static_cast<int>(model_.problem().slots[t].number);
      const double left = std::sqrt(model_.expected_sum(t)) / model_.loss_scale * verdict.coefficient;
      model_.tensor_coefficients.push_back(gradfast::tensor_coefficient(chain, number, left));
      if (!verdict.skip) gradfast::advance_tensor(chain, number, left);
    }
    if (!bad) gradfast::run_chain(chain, norm, true);
    model_.policy_coefficient = verdict.coefficient;
    model_.policy_skip = verdict.skip;
    return verdict;
  }

  void check_state() {
    device_.download();
    for (int i = 0; i < kDoubles; ++i) {
      double value;
      std::memcpy(&value, device_.host.data() + i * sizeof value, sizeof value);
      check(std::fabs(value - host_[i]) <= 1e-10 * std::fabs(host_[i]),
            "state " + std::to_string(i) + " is " + std::to_string(value) + ", not " + std::to_string(host_[i]));
    }
  }

  const std::vector<std::byte>& state_bytes() {
    device_.download();
    return device_.host;
  }

 private:
  static constexpr int kDoubles = 100;
  Model model_;
  Memory device_;
  std::vector<double> host_;
};

// Thirty steps with spikes; NaN and found_inf among them. Returns all bits that came out.
std::vector<std::byte> long_run(const PolicyChain& chain, bool in_phases, double loss_scale) {
  Policed policed(chain);
  Model& model = policed.model();
  model.loss_scale = loss_scale;
  Stepper stepper(0);
  int skipped = 0, clipped = 0, factors = 0;
  for (int step = 0; step < 30; ++step) {
    const bool nan = step == 3 || step == 17;
    model.found_infinite = step == 21;
    const double size = step == 2 || step == 19 || step == 25 ? 1000 : 1 + 0.05 * (step * 7 % 5);
    const auto verdict = policed.prepare(size, nan);
    skipped += verdict.skip;
    clipped += verdict.coefficient < 1;
    for (const double factor : model.tensor_coefficients) factors += factor < 1;
    model.run_and_check(stepper, step == 0, in_phases);
    policed.check_state();
    check(model.report(stepper).decider == verdict.decider, "decider");
  }
  check(skipped == 2, "spikes are skipped once there are enough norms to judge by: " + std::to_string(skipped));
  check(clipped + factors > 4, "and others clipped: " + std::to_string(clipped) + ", " + std::to_string(factors));
  std::vector<std::byte> all = model.bytes();
  all.insert(all.end(), policed.state_bytes().begin(), policed.state_bytes().end());
  return all;
}

void long_runs() {
  for (const double loss_scale : {1.0, 1024.0}) {
    const auto once = long_run(all_policies(), false, loss_scale);
    check(long_run(all_policies(), true, loss_scale) == once, "measured and updated apart, the same bits");
  }
}

void each_tensor_by_itself() {
  for (const Kind last : {kParameterNorm, kAdaGC}) {
    const auto once = long_run(each_tensor(last), false, 1024.0);
    check(long_run(each_tensor(last), true, 1024.0) == once, "measured and updated apart, the same bits");
  }
}

// Limits of two groups of three, and updates clipped beside them: factors on gradients and on learning rates.
void group_limits_and_rates() {
  for (const bool in_phases : {false, true}) {
    Model model(3);
    for (int g = 0; g < 3; ++g) model.add_group(kAdam, {0.1, 0.9, 0.99, 1e-3, 0.01, 0, 1, 0});
    for (int t = 0; t < 12; ++t) model.add(vector_of(1 + t * 1500), DType::float32, t % 3, t * 30);
    model.clips_updates = true;
    model.problem().groups[0].max_norm = 0.5;
    model.problem().groups[2].max_norm = 0.25;
    model.clip.max_norm = 2;
    for (int t = 0; t < 12; ++t) model.problem().slots[t].number = 11 - t;
    Stepper stepper(0);
    for (int step = 0; step < 2; ++step) {
      model.fill_gradients();
      model.remember();
      double sums[3] = {};
      for (int t = 0; t < 12; ++t) sums[t % 3] += model.expected_sum(t);
      const double whole = std::fmin(1, 2 / (std::sqrt(sums[0] + sums[1] + sums[2]) + 1e-6));
      model.tensor_coefficients.clear();
      for (int t = 0; t < 12; ++t) {
        const double limit = t % 3 == 0 ? 0.5 : t % 3 == 2 ? 0.25 : 1e9;
        model.tensor_coefficients.push_back(std::fmin(1, limit / (std::sqrt(sums[t % 3]) * whole + 1e-6)));
      }
      model.run_and_check(stepper, step == 0, in_phases);
    }
  }
}

#if defined(GRADFAST_SHIM)

void same_bits_on_every_grid() {
  for (const Kind last : {kGlobalNorm, kAdaGC}) {
    const PolicyChain chain = last == kAdaGC ? each_tensor(kAdaGC) : all_policies();
    const auto expected = long_run(chain, false, 1.0);
    for (const int multiprocessors : {1, 3}) {
      const OtherDevice device([&](shim::Device& d) { d.multiprocessors = multiprocessors; });
      check(long_run(chain, false, 1.0) == expected, std::to_string(multiprocessors) + " multiprocessors");
    }
  }
}

// A graph of one step, replayed: each replay decides from what the one before left.
void graph() {
  Policed replayed(all_policies()), stepped(all_policies());
  Stepper stepper(0), reference(0);
  cudaStream_t stream;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  replayed.model().run(stepper, true, Phase::both, stream);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  require(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  require(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  for (int step = 0; step < 12; ++step) {
    require(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    stepped.model().run(reference, step == 0, Phase::both, nullptr);
  }
  require(cudaStreamSynchronize(stream), "the replays");
  require(cudaDeviceSynchronize(), "the steps");
  check(replayed.state_bytes() == stepped.state_bytes(), "replays advance the state as steps do");
  check(replayed.model().bytes() == stepped.model().bytes(), "and step as steps do");
  require(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
  require(cudaGraphDestroy(graph), "cudaGraphDestroy");
  require(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

#endif

}  // namespace

void run_policy_cases() {
  for_each_device([](const std::string& device) {
    run_case("policies over thirty steps" + device, long_runs);
    run_case("policies that clip each tensor" + device, each_tensor_by_itself);
    run_case("limits of groups, clipped updates" + device, group_limits_and_rates);
  });
#if defined(GRADFAST_SHIM)
  run_case("policies: the same bits on every grid", same_bits_on_every_grid);
  run_case("policies: graph", graph);
#endif
}

}  // namespace test

// How a step is launched: grids and kept gradients that change nothing, tables of every size, graphs, fallbacks.
#include <cmath>
#include <string>

#include "cases.h"
#include "cuda/memory.h"
#include "cuda/schedule.h"
#include "devices.h"
#include "model.h"

namespace test {
namespace {

using gradfast::Phase;
using gradfast::Report;
using gradfast::cuda::Stepper;

const std::vector<double> kMomentum = {0.1, 0.9, 0, 1, 0.01, 0, 0};

// Many tensors of few elements, or few of many.
void add_tensors(Model& model, int count, std::int64_t elements, int group = 0) {
  for (int t = 0; t < count; ++t) model.add(vector_of(elements + t % 3), DType::float32, group, 1);
}

// 8 bytes of a table for each tensor, 80 for each group.
void add_tensors_and_groups(Model& model, int tensors, int groups) {
  for (int g = 0; g < groups; ++g) model.add_group(kSgdMomentum, kMomentum);
  for (int t = 0; t < tensors; ++t) model.add(vector_of(5 + t % 3), DType::float32, t % groups, 1);
  model.clip.max_norm = 0.5;
}

// ---- the schedule --------------------------------------------------------------------------------------------------

void schedule_covers_everything() {
  gradfast::Problem problem;
  problem.groups.resize(2);
  problem.groups[0].rule = 1;
  problem.groups[1].rule = 0;
  const std::int64_t sizes[] = {5, (std::int64_t{1} << 32) + 4097, 0, 4096, 70000};
  for (int t = 0; t < 5; ++t) {
    gradfast::Slot slot;
    slot.elements = sizes[t];
    slot.group = t % 2;
    problem.slots.push_back(slot);
  }
  const gradfast::cuda::Schedule schedule = gradfast::cuda::make_schedule(problem);
  check(schedule.slots == std::vector<std::int32_t>{1, 3, 0, 2, 4}, "sorted by rule, else in order");
  check(schedule.segments.size() == 2, "two segments");
  std::vector<std::int64_t> covered(5);
  for (const auto& chunk : schedule.chunks) {
    check(chunk.offset == covered[chunk.tensor] && chunk.length > 0, "chunks follow one another");
    check(chunk.offset % 8 == 0, "chunks begin at whole vectors");
    covered[chunk.tensor] += chunk.length;
    if (failed > 40) return;
  }
  for (int t = 0; t < 5; ++t) check(covered[t] == sizes[schedule.slots[t]], "all elements, beyond 2^32 too");
  const auto last = static_cast<std::int32_t>(schedule.chunks.size());
  for (const int blocks : {1, 2, 7, 132, 1000}) {
    const auto shares = gradfast::cuda::share_out(schedule.chunks, 0, last, blocks);
    check(static_cast<int>(shares.size()) == blocks + 1 && shares.front() == 0 && shares.back() == last, "ends");
    std::int64_t least = INT64_MAX, most = 0;
    for (int b = 0; b < blocks; ++b) {
      check(shares[b] <= shares[b + 1], "in order");
      std::int64_t cost = 0;
      for (int c = shares[b]; c < shares[b + 1]; ++c) cost += schedule.chunks[c].length + 512;
      least = std::min(least, cost);
      most = std::max(most, cost);
    }
    check(most - least <= 3 * (16384 + 512), "shares of about equal cost");
  }
}

void kept_gradients_fit() {
  gradfast::Problem problem;
  problem.groups.resize(1);
  problem.groups[0].rule = 0;
  for (int t = 0; t < 50; ++t) {
    gradfast::Slot slot;
    slot.elements = 100 + t * 977;
    problem.slots.push_back(slot);
  }
  auto schedule = gradfast::cuda::make_schedule(problem);
  const auto shares = gradfast::cuda::share_out(schedule.chunks, 0, static_cast<int>(schedule.chunks.size()), 3);
  std::vector<int> sizes(50, 4);
  sizes[20] = 0;  // not dense
  const int capacity = 70000;
  const int most = gradfast::cuda::keep_gradients(schedule.chunks, shares, sizes, capacity);
  check(most <= capacity && most > capacity / 2, "the memory is used");
  int kept = 0;
  for (int block = 0; block < 3; ++block) {
    int end = 0;
    for (int c = shares[block]; c < shares[block + 1]; ++c) {
      const auto& chunk = schedule.chunks[c];
      if (chunk.kept < 0) continue;
      check(chunk.kept >= end && chunk.kept % 16 == 0, "kept gradients do not overlap");
      check(sizes[chunk.tensor] > 0, "strided ones are not kept");
      end = chunk.kept + chunk.length * 4 + 15;
      check(end <= capacity, "and stay inside");
      ++kept;
    }
  }
  check(kept > 9, "many are kept");
}

// ---- tables --------------------------------------------------------------------------------------------------------

// Gradients at new addresses at every step, nobody waiting in between; checked at the end against one that waits.
void many_steps_in_flight(int tensors, int groups) {
  Model waits(3), flies(3);
  Stepper waiting(0), flying(0);
  for (Model* model : {&waits, &flies}) add_tensors_and_groups(*model, tensors, groups);
  cudaStream_t stream;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  for (int step = 0; step < 5; ++step) {
    for (auto& group : waits.problem().groups) group.values.value[0] = 0.1 / (step + 1);
    if (step > 0) waits.move_gradients();
    waits.step_and_check(waiting, step == 0);
    check(waiting.launches() == 1, "launches " + std::to_string(waiting.launches()));
  }
  // All copies of the gradients first, because making one waits for the device.
  std::vector<std::vector<void*>> gradients(5);
  for (int step = 0; step < 5; ++step) {
    if (step > 0) flies.move_gradients();
    for (const auto& slot : flies.problem().slots) gradients[step].push_back(slot.arrays[gradfast::kGradient]);
  }
  for (int step = 0; step < 5; ++step) {
    for (auto& group : flies.problem().groups) group.values.value[0] = 0.1 / (step + 1);
    for (int t = 0; t < tensors; ++t) flies.problem().slots[t].arrays[gradfast::kGradient] = gradients[step][t];
    flies.run(flying, step == 0, Phase::both, stream);
  }
  require(cudaStreamSynchronize(stream), "the steps");
  check(waits.bytes() == flies.bytes(), "steps in flight give what steps one by one give");
  require(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

// Parameters and states that move (load_state_dict) between steps in flight.
void moved_states() {
  Model model(2);
  model.add_group(kSgdMomentum, kMomentum);
  add_tensors(model, 20, 700);
  Stepper stepper(0);
  model.step_and_check(stepper, true);
  std::swap(model.problem().slots[3].step, model.problem().slots[4].step);
  model.remember();
  model.run(stepper, false, Phase::both, nullptr);
  std::swap(model.problem().slots[3].step, model.problem().slots[4].step);
  model.run(stepper, false, Phase::both, nullptr);
  require(cudaDeviceSynchronize(), "the steps");
  check(model.report(stepper).skipped == 0, "ran");
}

// ---- graphs --------------------------------------------------------------------------------------------------------

// A graph captured among eager steps, replayed after the tables went on to other contents.
void graph(int tensors, int groups, bool warm) {
  Model replayed(7), stepped(7);
  Stepper stepper(0), reference(0);
  for (Model* model : {&replayed, &stepped}) add_tensors_and_groups(*model, tensors, groups);
  cudaStream_t stream;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  int steps = 0;
  if (warm) {
    replayed.run(stepper, true, Phase::both, stream);
    require(cudaStreamSynchronize(stream), "the warm-up");
    replayed.move_gradients();
    ++steps;
  }
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  const auto replay = [&] {
    require(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    ++steps;
  };
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  try {
    replayed.problem().clip = replayed.clip;
    stepper.run(replayed.problem(), !warm, Phase::both, nullptr, stream);
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    throw;
  }
  require(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  require(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  const auto* captured_gradient = replayed.problem().slots[0].arrays[gradfast::kGradient];
  // An eager step with the very tables of the capture, before the graph ever ran.
  stepper.run(replayed.problem(), false, Phase::both, nullptr, stream);
  ++steps;
  replay();
  require(cudaStreamSynchronize(stream), "the replay");
  // Eager steps at other addresses: their tables must not be the graph's.
  for (int i = 0; i < 3; ++i) {
    replayed.move_gradients();
    check(replayed.problem().slots[0].arrays[gradfast::kGradient] != captured_gradient, "moved");
    stepper.run(replayed.problem(), false, Phase::both, nullptr, stream);
    ++steps;
    replay();
    require(cudaStreamSynchronize(stream), "the replay");
  }
  stepped.problem().clip = stepped.clip;
  for (int i = 0; i < steps; ++i) reference.run(stepped.problem(), i == 0, Phase::both, nullptr, nullptr);
  require(cudaDeviceSynchronize(), "the steps");
  check(replayed.bytes() == stepped.bytes(), "replays are steps");
  require(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
  require(cudaGraphDestroy(graph), "cudaGraphDestroy");
  require(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

// ---- phases --------------------------------------------------------------------------------------------------------

// Measure; add what another rank measured; update with the total.
void phases() {
  for (const bool own_sum : {false, true}) {
    Model model(11);
    model.add_group(kAdam, {0.01, 0.9, 0.99, 1e-3, 0.02, 0, 1, 0});
    for (const std::int64_t size : {100, 9000, 33}) model.add(vector_of(size), DType::float32, 0);
    model.clip.max_norm = 1;
    Stepper stepper(0);
    model.remember();
    model.run(stepper, true, Phase::measure, nullptr);
    require(cudaDeviceSynchronize(), "the measurement");
    check(stepper.launches() == 2, "launches of a measurement");
    model.check_unchanged();
    Report report = model.report(stepper);
    check(std::fabs(report.sum / model.expected_sum() - 1) < 1e-13, "sum");
    check(report.skipped_steps == 0 && report.first_nonfinite == -1, "nothing skipped");
    if (own_sum) {
      model.run(stepper, false, Phase::update, nullptr);
      require(cudaDeviceSynchronize(), "the update");
      model.check_step(stepper);
      continue;
    }
    Memory total(sizeof(double));
    const double doubled = 4 * report.sum;
    std::memcpy(total.host.data(), &doubled, sizeof doubled);
    total.upload();
    model.run(stepper, false, Phase::update, nullptr, reinterpret_cast<const double*>(total.device));
    require(cudaDeviceSynchronize(), "the update");
    check(stepper.launches() == 1, "launches of an update");
    const Report updated = model.report(stepper);
    check(updated.sum == doubled, "the report has the given sum");
    check(std::fabs(updated.norm / (2 * report.norm) - 1) < 1e-14, "twice the norm");
    check(std::fabs(updated.coefficient / (1 / (2 * report.norm + 1e-6)) - 1) < 1e-13, "half the coefficient");
  }
}

// Clipping as torch.nn.utils does it: the gradients themselves, with no step counters.
void gradient_functions() {
  for (const bool by_value : {false, true}) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      Model model(13);
      model.add_group(kClip, {0});
      for (const std::int64_t size : {7, 4099, 20000}) model.add(vector_of(size), dtype, 0);
      (by_value ? model.clip.element_limit : model.clip.max_norm) = by_value ? 0.25 : 1;
      Stepper stepper(0);
      model.step_and_check(stepper, true);
      model.step_and_check(stepper, false);
    }
  }
}

#if defined(GRADFAST_SHIM)

// ---- devices that a test may choose --------------------------------------------------------------------------------

std::vector<std::byte> result_on(const std::function<void(shim::Device&)>& change, Report* report = nullptr) {
  const OtherDevice device(change);
  Model model(21);
  model.add_group(kSgdMomentum, kMomentum);
  for (const std::int64_t size : {20000, 3, 4096, 9001, 0, 511}) {
    Shape shape = vector_of(size);
    shape.shift = {1, 2, 1, 0, 0};  // so that the kept copies are unaligned too
    model.add(shape, DType::float32, 0);
    model.add(vector_of(size), DType::float32, 0);
  }
  model.clip.max_norm = 1;
  Stepper stepper(0);
  for (int step = 0; step < 2; ++step) model.step_and_check(stepper, step == 0);
  if (report) *report = model.report(stepper);
  return model.bytes();
}

void same_bits_on_every_grid() {
  Report one;
  const auto expected = result_on([](shim::Device& d) { d.multiprocessors = d.blocks_per_multiprocessor = 1; }, &one);
  for (const int multiprocessors : {2, 3, 7}) {
    for (const bool cooperative : {true, false}) {
      Report report;
      const auto got = result_on(
          [&](shim::Device& d) {
            d.multiprocessors = multiprocessors;
            d.cooperative = cooperative;
          },
          &report);
      check(got == expected, "the same bits with " + std::to_string(multiprocessors) + " multiprocessors");
      check(std::memcmp(&report, &one, sizeof report) == 0, "the same report");
    }
  }
}

// No gradient kept, one chunk to a block, all but one byte for one, all of them.
void same_bits_whatever_is_kept() {
  const auto expected = result_on([](shim::Device& d) { d.cooperative = false; });
  const int base = sizeof(gradfast::cuda::BlockMemory);
  const int chunk = 4096 * 4 + 16;
  for (const int per_block : {base, base + 32, base + chunk - 1, base + chunk, base + 3 * chunk, 200 * 1024}) {
    const auto got = result_on([&](shim::Device& d) {
      d.shared_per_block = per_block;
      d.shared_per_multiprocessor = 2 * (per_block + d.shared_reserved);
    });
    check(got == expected, "the same bits with " + std::to_string(per_block) + " bytes of shared memory");
  }
}

void same_bits_in_any_order_of_threads() {
  const auto expected = result_on([](shim::Device&) {});
  for (std::uint32_t seed = 1; seed <= 3; ++seed) {
    const auto got = result_on([&](shim::Device& d) { d.order = {shim::Order::shuffled, seed}; });
    check(got == expected, "the same bits with seed " + std::to_string(seed));
  }
  check(result_on([](shim::Device& d) { d.order.kind = shim::Order::descending; }) == expected, "and backwards");
}

void refused_cooperation() {
  const OtherDevice device([](shim::Device& d) { d.refuse_cooperative = true; });
  Model model(2);
  model.add_group(kSgdMomentum, kMomentum);
  add_tensors(model, 5, 3000);
  Stepper stepper(0);
  model.step_and_check(stepper, true);
  check(stepper.launches() == 2, "two launches");
  model.step_and_check(stepper, false);
}

void old_driver() {
  const OtherDevice device([](shim::Device& d) { d.driver = 12000; });
  many_steps_in_flight(300, 100);
}

// The stepper says which call failed, and works again afterwards.
void errors() {
  Model model(2);
  model.add_group(kSgdMomentum, kMomentum);
  add_tensors(model, 5, 3000);
  Stepper stepper(0);
  model.step_and_check(stepper, true);
  add_tensors(model, 5, 30000);
  {
    const OtherDevice device([](shim::Device& d) { d.out_of_memory = true; });
    const std::string message = thrown_by([&] { model.run(stepper, true, Phase::both, nullptr); });
    check(message == "gradfast: cudaMalloc failed: cudaErrorMemoryAllocation (cudaErrorMemoryAllocation)", message);
  }
  model.step_and_check(stepper, false);  // even if the caller forgot that the change has not been taken in
}

#endif

}  // namespace

void run_launch_cases() {
  run_case("the schedule covers everything", schedule_covers_everything);
  run_case("kept gradients fit", kept_gradients_fit);
  run_case("steps in flight, small arguments", [] { many_steps_in_flight(40, 2); });
  run_case("steps in flight, large arguments", [] { many_steps_in_flight(300, 100); });
  run_case("steps in flight, table in device memory", [] { many_steps_in_flight(400, 390); });
  run_case("moved states", moved_states);
  for (const bool warm : {true, false}) {
    const std::string how = warm ? "" : ", captured first";
    run_case("graph, small arguments" + how, [&] { graph(40, 2, warm); });
    run_case("graph, table in device memory" + how, [&] { graph(400, 390, warm); });
  }
  run_case("phases", phases);
  run_case("gradient functions", gradient_functions);
#if defined(GRADFAST_SHIM)
  run_case("the same bits on every grid", same_bits_on_every_grid);
  run_case("the same bits whatever is kept", same_bits_whatever_is_kept);
  run_case("the same bits in any order of threads", same_bits_in_any_order_of_threads);
  run_case("refused cooperative launch", refused_cooperation);
  run_case("a driver without large arguments", old_driver);
  run_case("errors", errors);
#endif
}

}  // namespace test

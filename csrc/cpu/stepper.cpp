#include "cpu/stepper.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstddef>

#include "cpu/gather.h"
#include "cpu/mixed.h"

namespace gradfast::cpu {
namespace {

// 512 KB of fp32 gradients: small enough to share out evenly, and long enough for the streams in it to get going.
constexpr std::int64_t kChunkElements = 128 * 1024;

// Small tensors are handed out by so many elements: some 10 us of work.
constexpr std::int64_t kTaskElements = 16 * 1024;

// Below this a second thread costs more than it brings.
constexpr std::int64_t kSerialElements = 32 * 1024;

// True for tensors that are widened to fp32 a block at a time: those of mixed formats, and fp16, which a machine widens
// and rounds by instructions that compilers do not find in a loop over single elements.
bool goes_in_blocks(const Slot& slot) { return slot.mixed || slot.dtype == DType::float16; }

// Of the elements of one array.
DType dtype_of(const Slot& slot, int array) {
  if (!slot.mixed) return slot.dtype;
  switch (slot.formats.array[array]) {
    case Format::float16:
    case Format::float16_by_chance:
      return DType::float16;
    case Format::bfloat16:
    case Format::bfloat16_by_chance:
      return DType::bfloat16;
    default:
      return DType::float32;
  }
}

ClipDecision decide(const Problem& problem, double sum) {
  const bool found_infinite = problem.found_infinite != nullptr && *problem.found_infinite != 0;
  return gradfast::decide(problem.clip, gradfast::finish(problem.norm, sum), loss_scale_of(problem), found_infinite);
}

// Small tensors lie anywhere: those of a task are fetched into the cache so many chunks ahead of their turn.
constexpr int kAhead = 4;

void prefetch(const void* array, const Chunk& chunk, int bytes) {
  const std::byte* first = static_cast<const std::byte*>(array) + chunk.offset * bytes;
  __builtin_prefetch(first);
  __builtin_prefetch(first + 64);
}

}  // namespace

void Stepper::run(const Problem& problem, bool changed, Phase phase, double total, int threads) {
  if (changed || work_.size() != problem.slots.size()) prepare(problem);
  if (problem.clips_updates) rates_.assign(problem.slots.size(), 1.0);
  if (changed || problem.norm.kind != measured_kind_) choose_norm(problem);
  const bool measures = phase == Phase::measure || phase == Phase::both;
  const bool updates = phase == Phase::update || phase == Phase::both;
  const bool squares = measures_updates_apart(problem) &&
                       (phase == Phase::measure_updates || (updates && problem.update_means == nullptr));
  const auto tasks = static_cast<int>(plan_.tasks.size());
  if (plan_.elements < kSerialElements) threads = 1;
  std::atomic<int> next_measure{0}, next_square{0}, next_update{0};
  const double given = total;
  ClipDecision decision{};

  // A thread alone must not meet the barriers of a parallel region around this call, whose other threads are elsewhere.
  const auto wait_for_all = [threads] {
    if (threads == 1) return;
#pragma omp barrier
  };
  const auto once = [threads](auto&& function) {
    if (threads == 1) return function();
#pragma omp single
    function();
  };

  const auto work = [&](bool first_thread) {
    if (measures) {
      for (int t; (t = next_measure.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        measure_task(problem, plan_.tasks[t]);
      }
      wait_for_all();
      if (units_.any()) once([&] { units_.settle(problem, chunk_sums_); });
    }
    if (phase != Phase::measure && differs_by_tensor(problem)) {
      once([&] {
        if (measures) sum_tensors(problem.norm);
        sum_groups(problem);
        if (problem.clips_updates && !squares) find_rates(problem);
      });
    }
    // Every thread adds the same partial sums up in the same order: cheaper than one doing it while the others wait.
    const double sum = measures ? combine(problem.norm) : given;
    const ClipDecision mine = decide(problem, sum);
    if (first_thread) {
      decision = mine;
      total = sum;
    }
    if (squares && !mine.skip) {
      for (int t; (t = next_square.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        square_task(problem, plan_.tasks[t], mine);
      }
      wait_for_all();
      if (updates) once([&] { find_rates(problem); });
    }
    if (updates && !mine.skip) {
      for (int t; (t = next_update.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        update_task(problem, plan_.tasks[t], mine);
      }
    }
  };

  if (threads == 1) {
    work(true);
  } else {
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num() == 0);
  }
  finish(problem, phase, total, decision);
}

void Stepper::prepare(const Problem& problem) {
  std::vector<std::int64_t> sizes;
  work_.clear();
  for (const Slot& slot : problem.slots) {
    sizes.push_back(slot.elements);
    const int rule = problem.groups[slot.group].rule;
    const DType arithmetic = goes_in_blocks(slot) ? DType::float32 : slot.dtype;
    const DType weights = dtype_of(slot, slot.weights);
    work_.push_back({nullptr, rule < 0 ? UpdateFunctions{} : update_functions(rule, arithmetic), size_of(slot.dtype),
                     weights == slot.dtype ? measure_units_function(weights) : nullptr,
                     measure_function(NormKind::two, weights), size_of(weights)});
  }
  plan_ = make_plan(sizes, kChunkElements, kTaskElements);
  chunk_sums_.assign(plan_.chunks.size(), 0.0);
  chunk_squares_.assign(plan_.chunks.size(), 0.0);
  tensor_sums_.assign(problem.slots.size(), 0.0);
  units_.prepare(problem, plan_);
}

void Stepper::choose_norm(const Problem& problem) {
  for (std::size_t s = 0; s < work_.size(); ++s) {
    work_[s].measure = measure_function(problem.norm.kind, problem.slots[s].dtype);
  }
  measured_kind_ = problem.norm.kind;
}

void Stepper::measure_task(const Problem& problem, const Task& task) {
  for (int c = task.first_chunk; c < task.last_chunk; ++c) {
    if (c + kAhead < task.last_chunk) {
      const Chunk& next = plan_.chunks[c + kAhead];
      prefetch(problem.slots[next.tensor].arrays[kGradient], next, work_[next.tensor].bytes);
    }
    const Chunk& chunk = plan_.chunks[c];
    if (!units_.clip(c)) {
      chunk_sums_[c] = measure_chunk(problem, chunk, kGradient);
    } else {
      chunk_sums_[c] = units_.measure(problem, chunk, c, [&](const Chunk& first, std::int32_t count, UnitSums* sums) {
        measure_units(problem, first, count, sums);
      });
    }
    const bool beside = problem.clips_updates && !measures_updates_apart(problem);
    if (beside && work_[chunk.tensor].update.square_updates != nullptr) {
      // Nothing that needs the norm clips: the loss scale is all.
      chunk_squares_[c] = square_updates(problem, chunk, 1.0 / loss_scale_of(problem));
    }
  }
}

// Update clipping beside that of a norm: the squares of the updates that the gradients will make once they are clipped.
void Stepper::square_task(const Problem& problem, const Task& task, const ClipDecision& decision) {
  for (int c = task.first_chunk; c < task.last_chunk; ++c) {
    const Chunk& chunk = plan_.chunks[c];
    if (work_[chunk.tensor].update.square_updates == nullptr) continue;
    chunk_squares_[c] = square_updates(problem, chunk, scale_of_tensor(problem, chunk.tensor, decision));
  }
}

// The sum of powers of a chunk's gradients, or the sum of squares of its weights.
double Stepper::measure_chunk(const Problem& problem, const Chunk& chunk, int array) const {
  const Slot& slot = problem.slots[chunk.tensor];
  const Work& work = work_[chunk.tensor];
  const bool gradients = array == kGradient;
  const MeasureFunction measure = gradients ? work.measure : work.measure_weights;
  const int bytes = gradients ? work.bytes : work.weight_bytes;
  const double limit = gradients ? element_limit(problem.clip, problem.loss_scale) : INFINITY;
  if (slot.layout >= 0) {
    return measure_gathered(slot, problem.layouts[slot.layout], array, bytes, chunk, measure, problem.norm, limit);
  }
  return measure(static_cast<const std::byte*>(slot.arrays[array]) + chunk.offset * bytes, chunk.length, problem.norm.p,
                 limit);
}

// The sums of `count` pieces of units, of the length of the first.
void Stepper::measure_units(const Problem& problem, Chunk piece, std::int32_t count, UnitSums* sums) const {
  const Slot& slot = problem.slots[piece.tensor];
  const Work& work = work_[piece.tensor];
  if (slot.layout < 0 && work.measure_units != nullptr) {
    const auto from = [&](int array) {
      return static_cast<const std::byte*>(slot.arrays[array]) + piece.offset * work.bytes;
    };
    const double limit = element_limit(problem.clip, problem.loss_scale);
    return work.measure_units(from(kGradient), from(slot.weights), piece.length, count, limit, sums);
  }
  for (std::int32_t i = 0; i < count; ++i, piece.offset += piece.length) {
    sums[i] = {measure_chunk(problem, piece, kGradient), measure_chunk(problem, piece, slot.weights)};
  }
}

// The rule's constants for one tensor.
void Stepper::prepare_constants(const Problem& problem, std::int32_t tensor, double scale, void* constants) const {
  const Slot& slot = problem.slots[tensor];
  PackedHyperparameters values = problem.groups[slot.group].values;
  if (problem.clips_updates) values.value[0] *= rates_[tensor];
  const ElementClip<double> clip{element_limit(problem.clip, problem.loss_scale), scale};
  work_[tensor].update.prepare(values, slot.step == nullptr ? 1.0 : *slot.step + 1.0, clip, constants);
}

// The arrays of a dense chunk.
Span Stepper::span_of(const Problem& problem, const Chunk& chunk) const {
  const Work& work = work_[chunk.tensor];
  Span span{{}, chunk.length};
  for (int a = 0; a < work.update.arrays; ++a) {
    span.arrays[a] = static_cast<std::byte*>(problem.slots[chunk.tensor].arrays[a]) + chunk.offset * work.bytes;
  }
  return span;
}

double Stepper::square_updates(const Problem& problem, const Chunk& chunk, double scale) const {
  alignas(16) std::byte constants[kMaxConstantsBytes];
  prepare_constants(problem, chunk.tensor, scale, constants);
  const Slot& slot = problem.slots[chunk.tensor];
  const UpdateFunctions& functions = work_[chunk.tensor].update;
  const Layout* layout = slot.layout < 0 ? nullptr : &problem.layouts[slot.layout];
  if (goes_in_blocks(slot)) return square_updates_mixed(slot, layout, chunk, functions, constants);
  if (layout != nullptr) return square_updates_gathered(slot, *layout, chunk, functions, constants);
  return functions.square_updates(constants, span_of(problem, chunk));
}

std::vector<double> Stepper::update_sums() const {
  std::vector<double> sums(tensor_sums_.size(), 0.0);
  for (std::size_t c = 0; c < chunk_squares_.size(); ++c) sums[plan_.chunks[c].tensor] += chunk_squares_[c];
  return sums;
}

// Update clipping: what each tensor's learning rate is multiplied with, 1 / max(1, RMS).
void Stepper::find_rates(const Problem& problem) {
  const std::vector<double> sums = update_sums();
  for (std::size_t t = 0; t < rates_.size(); ++t) {
    const Slot& slot = problem.slots[t];
    const bool given = problem.update_means != nullptr;
    rates_[t] =
        rate_for_updates(given ? problem.update_means[slot.number] : sums[t] / static_cast<double>(slot.elements));
  }
}

void Stepper::update_task(const Problem& problem, const Task& task, const ClipDecision& decision) const {
  alignas(16) std::byte constants[kMaxConstantsBytes];
  const bool by_tensor = differs_by_tensor(problem);
  const Slot* prepared = nullptr;  // the constants are those of this slot: neighbours mostly share them
  for (int c = task.first_chunk; c < task.last_chunk; ++c) {
    if (c + kAhead < task.last_chunk) {
      const Chunk& next = plan_.chunks[c + kAhead];
      const Slot& slot = problem.slots[next.tensor];
      for (int a = 0; a < work_[next.tensor].update.arrays; ++a) {
        prefetch(slot.arrays[a], next, work_[next.tensor].bytes);
      }
      __builtin_prefetch(slot.step);
    }
    const Chunk& chunk = plan_.chunks[c];
    const Slot& slot = problem.slots[chunk.tensor];
    const UpdateFunctions& functions = work_[chunk.tensor].update;
    const bool same = prepared != nullptr && (!by_tensor || prepared == &slot) && prepared->group == slot.group &&
                      prepared->dtype == slot.dtype &&
                      (prepared->step == slot.step || (prepared->step && slot.step && *prepared->step == *slot.step));
    if (!same) {
      const double scale = by_tensor ? scale_of_tensor(problem, chunk.tensor, decision) : decision.scale;
      prepare_constants(problem, chunk.tensor, scale, constants);
      prepared = &slot;
    }
    if (!units_.clip(c)) {
      update_chunk(problem, chunk, constants);
      continue;
    }
    units_.for_each_part(problem, chunk, c, [&](const Chunk& part, double factor) {
      alignas(16) std::byte rescaled[kMaxConstantsBytes];
      functions.rescale(constants, factor, rescaled);
      update_chunk(problem, part, rescaled);
    });
  }
}

void Stepper::update_chunk(const Problem& problem, const Chunk& chunk, const void* constants) const {
  const Slot& slot = problem.slots[chunk.tensor];
  const UpdateFunctions& functions = work_[chunk.tensor].update;
  const Layout* layout = slot.layout < 0 ? nullptr : &problem.layouts[slot.layout];
  if (goes_in_blocks(slot)) {
    update_mixed(slot, layout, chunk, functions, constants, problem.rounding_seed);
  } else if (layout == nullptr) {
    functions.update(constants, span_of(problem, chunk));
  } else {
    update_gathered(slot, *layout, chunk, functions, constants);
  }
}

double Stepper::combine(const Norm& norm) const {
  double total = 0;
  for (std::size_t c = 0; c < chunk_sums_.size();) {
    const std::int32_t tensor = plan_.chunks[c].tensor;
    double sum = 0;
    for (; c < chunk_sums_.size() && plan_.chunks[c].tensor == tensor; ++c) sum = join(norm, sum, chunk_sums_[c]);
    total = join(norm, total, sum);
  }
  return total;
}

void Stepper::sum_tensors(const Norm& norm) {
  std::fill(tensor_sums_.begin(), tensor_sums_.end(), 0.0);
  for (std::size_t c = 0; c < chunk_sums_.size(); ++c) {
    double& sum = tensor_sums_[plan_.chunks[c].tensor];
    sum = join(norm, sum, chunk_sums_[c]);
  }
}

// The norm of one tensor's gradient in memory, of which another process may hold parts.
double Stepper::norm_of_tensor(const Problem& problem, std::int32_t tensor) const {
  const double sum =
      problem.parameter_sums == nullptr ? tensor_sums_[tensor] : problem.parameter_sums[problem.slots[tensor].number];
  return gradfast::finish(problem.norm, sum);
}

// The norm of the gradients of each group that has a limit of its own.
void Stepper::sum_groups(const Problem& problem) {
  group_norms_.assign(problem.groups.size(), 0.0);
  if (!has_group_limits(problem)) return;
  for (std::size_t t = 0; t < problem.slots.size(); ++t) {
    double& sum = group_norms_[problem.slots[t].group];
    sum = join(problem.norm, sum, tensor_sums_[t]);
  }
  for (double& sum : group_norms_) sum = gradfast::finish(problem.norm, sum);
}

// What the gradients of one tensor are multiplied with.
double Stepper::scale_of_tensor(const Problem& problem, std::int32_t tensor, const ClipDecision& decision) const {
  const Slot& slot = problem.slots[tensor];
  const double limit = problem.groups[slot.group].max_norm;
  return tensor_scale(problem.clip, decision, static_cast<int>(slot.number), norm_of_tensor(problem, tensor)) *
         group_coefficient(decision, limit, group_norms_[slot.group]);
}

void Stepper::finish(const Problem& problem, Phase phase, double total, const ClipDecision& decision) {
  if (phase == Phase::measure_updates) return;
  if (phase != Phase::update) {
    sum_tensors(problem.norm);
    const auto bad = std::find_if_not(tensor_sums_.begin(), tensor_sums_.end(), is_finite);
    report_.first_nonfinite = bad == tensor_sums_.end() ? -1 : static_cast<std::int32_t>(bad - tensor_sums_.begin());
  }
  report_.sum = total;
  report_.norm = decision.norm;
  report_.coefficient = decision.coefficient;
  report_.limit = decision.limit;
  report_.decider = decision.decider;
  report_.found_infinite = is_finite(decision.norm) ? 0.0f : 1.0f;
  if (phase == Phase::measure) return;
  for (std::size_t t = 0; decision.each_tensor && t < problem.slots.size(); ++t) {
    advance_tensor(problem.clip, decision, static_cast<int>(problem.slots[t].number),
                   norm_of_tensor(problem, static_cast<std::int32_t>(t)));
  }
  advance_policies(problem.clip, decision);
  report_.skipped = decision.skip ? 1 : 0;
  report_.skipped_steps += report_.skipped;
  if (decision.skip) return;
  for (const Slot& slot : problem.slots) {
    if (slot.step != nullptr) *slot.step += 1.0f;
  }
}

}  // namespace gradfast::cpu

// One step over all tensors in host memory: measure, decide, update, in one parallel region.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/measure_units.h"
#include "cpu/units.h"
#include "plan/chunk.h"
#include "plan/problem.h"

namespace gradfast::cpu {

class Stepper {
 public:
  // Runs one step and returns when it is done.
  //   changed  the slots' number, sizes, dtypes, groups or layouts, or the groups' rules, differ from the last call's
  //   total    a sum of powers to clip by, for Phase::update and Phase::measure_updates
  //   threads  how many workers at most; the result does not depend on it
  void run(const Problem& problem, bool changed, Phase phase, double total, int threads);

  const Report& report() const { return report_; }
  const std::vector<double>& tensor_sums() const { return tensor_sums_; }
  std::vector<double> update_sums() const;  // of each tensor's squared updates, if they are clipped

 private:
  struct Work {
    MeasureFunction measure;
    UpdateFunctions update;
    int bytes;  // of an element
    // For AGC. Gradients and weights in one sweep; null where they go one after the other.
    MeasureUnitsFunction measure_units;
    MeasureFunction measure_weights;
    int weight_bytes;
  };

  void prepare(const Problem& problem);
  void choose_norm(const Problem& problem);
  void measure_task(const Problem& problem, const Task& task);
  double measure_chunk(const Problem& problem, const Chunk& chunk, int array) const;
  void measure_units(const Problem& problem, Chunk piece, std::int32_t count, UnitSums* sums) const;
  void prepare_constants(const Problem& problem, std::int32_t tensor, double scale, void* constants) const;
  Span span_of(const Problem& problem, const Chunk& chunk) const;
  double square_updates(const Problem& problem, const Chunk& chunk, double scale) const;
  void square_task(const Problem& problem, const Task& task, const ClipDecision& decision);
  void find_rates(const Problem& problem);
  void update_task(const Problem& problem, const Task& task, const ClipDecision& decision) const;
  void update_chunk(const Problem& problem, const Chunk& chunk, const void* constants) const;
  void sum_tensors(const Norm& norm);
  void sum_groups(const Problem& problem);
  double scale_of_tensor(const Problem& problem, std::int32_t tensor, const ClipDecision& decision) const;
  double norm_of_tensor(const Problem& problem, std::int32_t tensor) const;
  double combine(const Norm& norm) const;
  void finish(const Problem& problem, Phase phase, double total, const ClipDecision& decision);

  Plan plan_;
  std::vector<Work> work_;  // one a slot
  NormKind measured_kind_ = NormKind::two;
  std::vector<double> chunk_sums_;
  std::vector<double> tensor_sums_;
  std::vector<double> chunk_squares_, rates_;  // for update clipping: of chunks, of tensors
  std::vector<double> group_norms_;            // where a group has a limit of its own
  Units units_;                                // for AGC
  Report report_;
};

}  // namespace gradfast::cpu

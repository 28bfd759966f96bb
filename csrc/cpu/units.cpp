#include "cpu/units.h"

#include <algorithm>

namespace gradfast::cpu {

void Units::prepare(const Problem& problem, const Plan& plan) {
  std::vector<std::int64_t> row_lengths;
  for (const Slot& slot : problem.slots) row_lengths.push_back(slot.row_length);
  plan_ = plan_units(plan.chunks, row_lengths);
  sums_.assign(plan_.pieces, UnitSums{});
  factors_.assign(plan_.pieces, 1.0);
}

void Units::settle(const Problem& problem, std::vector<double>& chunk_sums) {
  for (std::size_t c = 0; c < chunk_sums.size(); ++c) {
    const ChunkUnits& units = plan_.chunks[c];
    if (!units.begins_crossing()) continue;
    chunk_sums[c] += find_factor(problem, units.first_piece + units.pieces - 1, 1 + units.beyond);
  }
}

double Units::find_factor(const Problem& problem, std::int64_t first, std::int64_t count) {
  UnitSums unit;
  for (std::int64_t i = first; i < first + count; ++i) unit = join(unit, sums_[i]);
  const double factor = unit_factor(problem.clip.units, unit, loss_scale_of(problem));
  std::fill_n(factors_.begin() + first, count, factor);
  return clipped_square(unit, factor);
}

}  // namespace gradfast::cpu

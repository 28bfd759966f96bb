// AGC between the two hot loops: the pieces of units in each chunk, what they measure, and the factors that this comes
// to. Reads the weights once more in phase one: 4 bytes an fp32 parameter, 28 for SGD with momentum and 36 for Adam.
#pragma once

#include <vector>

#include "plan/chunk.h"
#include "plan/problem.h"
#include "plan/units.h"

namespace gradfast::cpu {

class Units {
 public:
  // For a new plan.
  void prepare(const Problem& problem, const Plan& plan);

  bool any() const { return !factors_.empty(); }
  bool clip(std::size_t chunk) const { return any() && plan_.chunks[chunk].pieces > 0; }

  // Measures a chunk by `measure_units(first, count, sums)`: so many pieces of one length, the first of them a Chunk
  // again. Returns the sum of squares that clipping leaves of the units that lie in this chunk alone.
  template <class Function>
  double measure(const Problem& problem, const Chunk& chunk, std::size_t number, Function&& measure_units);

  // When all chunks are measured: adds every other unit to the sum of the chunk in which it begins.
  void settle(const Problem& problem, std::vector<double>& chunk_sums);

  // Calls `function(part, factor)` for the parts of a chunk, Chunks again, that have one factor.
  template <class Function>
  void for_each_part(const Problem& problem, const Chunk& chunk, std::size_t number, Function&& function) const;

 private:
  // The `count` pieces from `first` on are one unit. Returns what clipping leaves of its sum of squares.
  double find_factor(const Problem& problem, std::int64_t first, std::int64_t count);

  UnitPlan plan_;
  std::vector<UnitSums> sums_;   // of all pieces
  std::vector<double> factors_;  // likewise
};

template <class Function>
double Units::measure(const Problem& problem, const Chunk& chunk, std::size_t number, Function&& measure_units) {
  const ChunkUnits& units = plan_.chunks[number];
  const std::int64_t row_length = problem.slots[chunk.tensor].row_length;
  for (std::int32_t k = 0, end; k < units.pieces; k = end) {
    const Chunk piece = piece_of(chunk, row_length, k);
    for (end = k + 1; end < units.pieces && piece_of(chunk, row_length, end).length == piece.length;) ++end;
    measure_units(piece, end - k, &sums_[units.first_piece + k]);
  }
  double left = 0;
  for (std::int32_t k = 0; k < units.pieces; ++k) {
    if (units.is_whole(k)) left += find_factor(problem, units.first_piece + k, 1);
  }
  return left;
}

template <class Function>
void Units::for_each_part(const Problem& problem, const Chunk& chunk, std::size_t number, Function&& function) const {
  const ChunkUnits& units = plan_.chunks[number];
  const double* factors = factors_.data() + units.first_piece;
  const std::int64_t row_length = problem.slots[chunk.tensor].row_length;
  for (std::int32_t k = 0, end; k < units.pieces; k = end) {
    Chunk part = piece_of(chunk, row_length, k);
    for (end = k + 1; end < units.pieces && factors[end] == factors[k]; ++end) {
      part.length += piece_of(chunk, row_length, end).length;
    }
    function(part, factors[k]);
  }
}

}  // namespace gradfast::cpu

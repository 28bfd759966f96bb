// Phase 1 with AGC (rules/agc.h): beside a gradient its weight is read, 4 bytes a parameter more in fp32, and every
// piece of a unit (plan/units.h) leaves its two sums of squares. A unit that lies in one chunk has its factor at once,
// and the chunk's partial sum is that of what its factor leaves; units that cross chunks are settled after the barrier,
// in decide.cuh. Off the main path: element by element, coalesced, and no gradient is kept in shared memory.
#pragma once

#include "measure.cuh"
#include "mixed.cuh"
#include "plan/units.h"

namespace gradfast::cuda {

// Of one tensor, from its first element on.
template <class Storage>
struct UnitArrays {
  using Array = decltype(array_from<Storage>(nullptr, Format{}, 0));
  Array gradients, weights;
  const Layout* layout;  // null: dense
  int weights_number;
  Arithmetic<Storage> limit;

  GF_DEVICE UnitArrays(const Header& header, const TensorEntry& tensor, const void* gradients_start)
      : gradients(array_from<Storage>(gradients_start, tensor.formats.array[kGradient], 0)),
        weights(array_from<Storage>(tensor.arrays[tensor.weights], tensor.formats.array[tensor.weights], 0)),
        layout(tensor.layout < 0 ? nullptr : header.layouts + tensor.layout),
        weights_number(tensor.weights),
        limit(measured<Arithmetic<Storage>>(header).limit) {}

  GF_DEVICE UnitSums add(const UnitSums& sums, std::int64_t element) const {
    const auto at = [&](int array) { return layout ? layout->offset(element, array) : element; };
    const auto g = static_cast<double>(clamp(load_one(gradients, at(kGradient)), limit));
    const auto w = static_cast<double>(load_one(weights, at(weights_number)));
    return {sums.gradients + g * g, sums.weights + w * w};
  }
};

// Measures the pieces of one chunk, by one warp; returns the sum of squares of its whole units after clipping. Units of
// a few elements are a lane's each, longer ones the warp's.
template <class Storage>
GF_DEVICE double measure_pieces(const Header& header, const ChunkEntry& chunk, const ChunkUnits& units,
                                std::int64_t row_length, const UnitArrays<Storage>& arrays) {
  const double loss_scale = loss_scale_of(header);
  double sum = 0;
  const auto leave = [&](int k, const UnitSums& sums) {
    header.unit_sums[units.first_piece + k] = sums;
    if (!units.is_whole(k)) return;
    const double factor = unit_factor(header.clip.units, sums, loss_scale);
    header.unit_factors[units.first_piece + k] = factor;
    sum += clipped_square(sums, factor);
  };
  const bool short_rows = row_length <= kWarpSize;
  GF_NO_UNROLL
  for (int k = short_rows ? lane_index() : 0; k < units.pieces; k += short_rows ? kWarpSize : 1) {
    const ChunkEntry piece = piece_of(chunk, row_length, k);
    UnitSums sums;
    GF_NO_UNROLL
    for (int i = short_rows ? 0 : lane_index(); i < piece.length; i += short_rows ? 1 : kWarpSize) {
      sums = arrays.add(sums, piece.offset + i);
    }
    if (!short_rows) sums = warp_join(sums);
    if (short_rows || lane_index() == 0) leave(k, sums);
  }
  return warp_join<NormTwo>(sum);
}

// Measures the chunks of this block that are clipped by units, a warp each.
template <class Storage>
GF_DEVICE void measure_units(const Header& header, Changing changing, Share share) {
  GF_NO_UNROLL
  for (int c = share.first + warp_index(); c < share.last; c += kWarps) {
    const ChunkUnits units = header.chunk_units[c];
    if (units.pieces == 0) continue;
    const ChunkEntry chunk = header.chunks[c];
    const TensorEntry& tensor = header.tensors[chunk.tensor];
    const UnitArrays<Storage> arrays(header, tensor, changing.gradients[chunk.tensor]);
    const double sum = measure_pieces(header, chunk, units, tensor.row_length, arrays);
    if (lane_index() == 0) header.partials[c] = sum;
  }
}

}  // namespace gradfast::cuda

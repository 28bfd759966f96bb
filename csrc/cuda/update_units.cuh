// Phase 2 with AGC: the rule applied with every unit's factor beside the scale that all share. An element at a time,
// coalesced: AGC reads 4 bytes a parameter more than it need, a few instructions more do not count.
#pragma once

#include "decide.cuh"
#include "mixed.cuh"

namespace gradfast::cuda {

// The factors of the pieces of one chunk: those of the first and the last, which may belong to units that cross chunks,
// are found by the warp; the others lie in memory.
struct PieceFactors {
  const double* factors;
  int last_piece;
  double first, last;

  GF_DEVICE PieceFactors(const Header& header, const ChunkUnits& units)
      : factors(header.unit_factors + units.first_piece), last_piece(units.pieces - 1) {
    const int begin = units.before, end = units.pieces == 1 ? units.beyond : 0;
    first = factor_of_unit(header, units.first_piece - begin, begin + 1 + end);
    last = last_piece == 0 ? first : factor_of_unit(header, units.first_piece + last_piece, 1 + units.beyond);
  }

  GF_DEVICE double operator()(int k) const {
    return k == 0 ? first : k == last_piece ? last : load_shared_by_blocks(factors + k);
  }
};

template <class Rule, class Storage>
GF_DEVICE void update_pieces(const ConstantsOf<Rule, Storage>& constants, const Header& header, const ChunkEntry& chunk,
                             const TensorEntry& tensor, const void* gradients, const PieceFactors& factors) {
  const Layout* layout = tensor.layout < 0 ? nullptr : header.layouts + tensor.layout;
  const std::int64_t past_row = chunk.offset % tensor.row_length;  // of the chunk's first element
  GF_NO_UNROLL
  for (int i = lane_index(); i < chunk.length; i += kWarpSize) {
    const int k = factors.last_piece == 0 ? 0 : static_cast<int>((past_row + i) / tensor.row_length);
    const auto of_piece = rescaled(constants, factors(k));
    const std::int64_t element = chunk.offset + i;
    const auto at = [&](int array) { return layout ? layout->offset(element, array) : element; };
    if constexpr (std::is_same_v<Storage, Mixed>) {
      const MixedTensor<Rule> mixed(header, tensor);
      update_one(of_piece, mixed, mixed.gradients(gradients, 0), element, at);
    } else {
      update_element(of_piece, ChunkArrays<Rule, Storage>(tensor, gradients, 0), at);
    }
  }
}

// Updates the chunks of this block that are clipped by units, a warp each, last first.
template <class Rule, class Storage>
GF_DEVICE void update_units(const Header& header, Changing changing, Share share, double scale,
                            unsigned char* constants_of_warp) {
  Prepared prepared;
  GF_NO_UNROLL
  for (int c = share.last - 1 - warp_index(); c >= share.first; c -= kWarps) {
    const ChunkUnits units = header.chunk_units[c];
    if (units.pieces == 0) continue;
    const ChunkEntry chunk = header.chunks[c];
    const auto& constants = prepare<Rule, Storage>(prepared, header, changing, chunk.tensor, scale, constants_of_warp);
    update_pieces<Rule, Storage>(constants, header, chunk, header.tensors[chunk.tensor],
                                 changing.gradients[chunk.tensor], PieceFactors(header, units));
  }
}

}  // namespace gradfast::cuda

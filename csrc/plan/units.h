// Where the units of AGC (rules/agc.h) lie in the chunks.
//
// A unit is a run of Slot::row_length elements, counted as chunks count them; chunks need not end where units do. The
// part of a unit in one chunk is a *piece*. All pieces stand in one row in the order of the chunks and their elements,
// so those of a unit are neighbours, and a chunk's are `first_piece`, `first_piece + 1` and so on:
//
//   chunks     |          0          |        1        |        2        |
//   units      |    A    |    B    |           C                   |  D  |
//   pieces     0         1         2 3                 4           5     |
//
// Of a chunk's pieces only the first may go on from an earlier chunk (`before`), and only the last may go on in a later
// one (`beyond`). Every other piece is a whole unit, and its factor is known as soon as the chunk is measured. Those
// that cross chunks are settled between the phases, by joining at most `before + 1 + beyond` neighbours.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "plan/chunk.h"
#include "rules/agc.h"

namespace gradfast {

struct ChunkUnits {
  std::int64_t first_piece = 0;
  std::int32_t pieces = 0;  // 0: the tensor is not clipped by units
  std::int32_t before = 0;  // pieces of the first unit here that lie in earlier chunks
  std::int32_t beyond = 0;  // pieces of the last unit here that lie in later chunks
  std::int32_t unused = 0;

  // True if the unit of piece `k` of this chunk, counted from 0, lies in this chunk alone.
  GF_HOST_DEVICE bool is_whole(std::int32_t k) const {
    return !(k == 0 && before > 0) && !(k == pieces - 1 && beyond > 0);
  }
  // True if a unit begins in this chunk and goes on in the next.
  GF_HOST_DEVICE bool begins_crossing() const { return beyond > 0 && (pieces > 1 || before == 0); }
};

struct UnitPlan {
  std::vector<ChunkUnits> chunks;  // one a chunk; none where nothing is clipped by units
  std::int64_t pieces = 0;
};

// Piece `k`, counted from 0, of a chunk: a chunk again. `chunk` is any struct with these three members.
template <class AnyChunk>
GF_HOST_DEVICE AnyChunk piece_of(AnyChunk chunk, std::int64_t row_length, std::int32_t k) {
  const std::int64_t row = (chunk.offset / row_length + k) * row_length, end = chunk.offset + chunk.length;
  if (row > chunk.offset) chunk.offset = row;
  chunk.length = static_cast<std::int32_t>((row + row_length < end ? row + row_length : end) - chunk.offset);
  return chunk;
}

// `row_lengths`: as in Slot, of each tensor.
inline UnitPlan plan_units(const std::vector<Chunk>& chunks, const std::vector<std::int64_t>& row_lengths) {
  UnitPlan plan;
  if (std::all_of(row_lengths.begin(), row_lengths.end(), [](std::int64_t length) { return length == 0; })) return plan;
  plan.chunks.resize(chunks.size());
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    const Chunk& chunk = chunks[c];
    ChunkUnits& here = plan.chunks[c];
    here.first_piece = plan.pieces;
    const std::int64_t row_length = row_lengths[chunk.tensor];
    if (row_length == 0) continue;
    const std::int64_t last = chunk.offset + chunk.length - 1;
    here.pieces = static_cast<std::int32_t>(last / row_length - chunk.offset / row_length + 1);
    plan.pieces += here.pieces;
    if (chunk.offset % row_length == 0) continue;
    const ChunkUnits& previous = plan.chunks[c - 1];
    here.before = 1 + (previous.pieces == 1 ? previous.before : 0);
  }
  for (std::size_t c = chunks.size(); c-- > 1;) {
    const ChunkUnits& here = plan.chunks[c];
    if (here.before > 0) plan.chunks[c - 1].beyond = 1 + (here.pieces == 1 ? here.beyond : 0);
  }
  return plan;
}

}  // namespace gradfast

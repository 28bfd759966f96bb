// How the work of a Problem is cut for a GPU, from the tensors' sizes, dtypes and rules alone. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "plan/chunk.h"
#include "plan/problem.h"
#include "plan/units.h"
#include "table.h"

namespace gradfast::cuda {

// Neighbouring tensors of one storage and rule: what one launch can update.
struct Segment {
  StorageKind storage;
  int rule;  // -1: measured only
  std::int32_t first_tensor, last_tensor;
  std::int32_t first_chunk, last_chunk;
};

struct Schedule {
  std::vector<std::int32_t> slots;         // slot of each tensor: sorted by storage and rule, else in their own order
  std::vector<std::int32_t> first_chunks;  // of each tensor, and the number of chunks
  std::vector<ChunkEntry> chunks;
  std::vector<Segment> segments;
  UnitPlan units;  // of AGC, with no chunks where nothing is clipped by units
};

// A chunk is one warp's work. Small ones share out evenly, large ones leave fewer partial sums for every block to read:
// 4096 elements until there are 16,384 chunks, then up to four times that. Never a function of the GPU, because the
// order of summation, and so the last bits of the norm, depend on it.
inline std::int64_t chunk_elements(std::int64_t elements) {
  std::int64_t length = 4096;
  while (length < 16384 && elements / length > 16384) length *= 2;
  return length;
}

inline Schedule make_schedule(const Problem& problem) {
  Schedule schedule;
  const auto kind = [&](std::int32_t slot) {
    const Slot& s = problem.slots[slot];
    return std::make_tuple(storage_of(s), problem.groups[s.group].rule);
  };
  schedule.slots.resize(problem.slots.size());
  std::iota(schedule.slots.begin(), schedule.slots.end(), 0);
  std::stable_sort(schedule.slots.begin(), schedule.slots.end(),
                   [&](std::int32_t a, std::int32_t b) { return kind(a) < kind(b); });

  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> row_lengths;
  for (const std::int32_t slot : schedule.slots) {
    sizes.push_back(problem.slots[slot].elements);
    row_lengths.push_back(problem.slots[slot].row_length);
  }
  const std::int64_t elements = std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
  const Plan plan = make_plan(sizes, chunk_elements(elements), elements);
  const auto tensors = static_cast<std::int32_t>(sizes.size());
  schedule.first_chunks.assign(tensors + 1, 0);
  for (const Chunk& chunk : plan.chunks) {
    schedule.chunks.push_back({chunk.tensor, chunk.length, chunk.offset, -1});
    ++schedule.first_chunks[chunk.tensor + 1];
  }
  schedule.units = plan_units(plan.chunks, row_lengths);
  std::partial_sum(schedule.first_chunks.begin(), schedule.first_chunks.end(), schedule.first_chunks.begin());

  for (std::int32_t first = 0, last; first < tensors; first = last) {
    last = first + 1;
    while (last < tensors && kind(schedule.slots[last]) == kind(schedule.slots[first])) ++last;
    const Slot& slot = problem.slots[schedule.slots[first]];
    schedule.segments.push_back({storage_of(slot), problem.groups[slot.group].rule, first, last,
                                 schedule.first_chunks[first], schedule.first_chunks[last]});
  }
  return schedule;
}

// Cuts chunks [first, last) into `blocks` runs of about equal cost. Block b takes those from the result's element b up
// to its element b + 1.
inline std::vector<std::int32_t> share_out(const std::vector<ChunkEntry>& chunks, std::int32_t first, std::int32_t last,
                                           int blocks) {
  constexpr std::int64_t kCostOfAChunk = 512;  // beside its elements: reading the tables, joining the lanes' sums
  std::int64_t total = 0;
  for (std::int32_t c = first; c < last; ++c) total += chunks[c].length + kCostOfAChunk;
  std::vector<std::int32_t> shares{first};
  std::int64_t cost = 0;
  std::int32_t next = first;
  for (int block = 1; block < blocks; ++block) {
    // A chunk goes to the block in whose part of the total its middle lies.
    while (next < last && (cost + (chunks[next].length + kCostOfAChunk) / 2) * blocks < total * block) {
      cost += chunks[next++].length + kCostOfAChunk;
    }
    shares.push_back(next);
  }
  shares.push_back(last);
  return shares;
}

// Decides which chunks of each block keep their gradients in `capacity` bytes of shared memory: the first ones, which
// leave the L2 cache first. `sizes`: bytes of a gradient of each tensor, 0 if it is not to be kept. Returns the bytes
// that the fullest block uses.
inline int keep_gradients(std::vector<ChunkEntry>& chunks, const std::vector<std::int32_t>& shares,
                          const std::vector<int>& sizes, int capacity) {
  int most = 0;
  for (std::size_t block = 0; block + 1 < shares.size(); ++block) {
    int used = 0;
    for (std::int32_t c = shares[block]; c < shares[block + 1]; ++c) {
      // Up to 15 bytes go before it, so that it lies in a 16-byte line as it does in global memory.
      const int size = sizes[chunks[c].tensor];
      const int bytes = (chunks[c].length * size + 15) / 16 * 16 + 16;
      const bool fits = size > 0 && used + bytes <= capacity;
      chunks[c].kept = fits ? used : -1;
      used += fits ? bytes : 0;
    }
    most = std::max(most, used);
  }
  return most;
}

}  // namespace gradfast::cuda

// Between the phases: every block adds up the chunks' partial sums, in the same order whatever the grid, and so comes
// to the same decision by itself. Costs 8 bytes a chunk of 4096 elements or more, read from L2.
#pragma once

#include "measure.cuh"
#include "rules/clip.h"

namespace gradfast::cuda {

// Joins the values of all threads of the block; every thread returns the same.
GF_DEVICE double block_join(BlockMemory& memory, const Norm& norm, double value) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = join(norm, value, shuffle_xor(value, mask));
  if (lane_index() == 0) memory.sums[warp_index()] = value;
  block_barrier();
  value = memory.sums[0];
  for (int warp = 1; warp < kWarps; ++warp) value = join(norm, value, memory.sums[warp]);
  return value;
}

// The sums of a unit of which pieces lie from `first` on: those of every `stride`-th from number `from` on.
GF_DEVICE UnitSums sums_of_pieces(const Header& header, std::int64_t first, int pieces, int from, int stride) {
  UnitSums sums;
  GF_NO_UNROLL
  for (int p = from; p < pieces; p += stride) {
    const UnitSums& piece = header.unit_sums[first + p];
    sums = join(sums, {load_shared_by_blocks(&piece.gradients), load_shared_by_blocks(&piece.weights)});
  }
  return sums;
}

// The unit's factor, by one warp, in every lane.
GF_DEVICE double factor_of_unit(const Header& header, std::int64_t first, int pieces) {
  const UnitSums sums = warp_join(sums_of_pieces(header, first, pieces, lane_index(), kWarpSize));
  return unit_factor(header.clip.units, sums, loss_scale_of(header));
}

// AGC: the sum of squares after clipping of the units that begin in one of every `stride`-th chunk and go on in the
// next.
GF_DEVICE_CALL double crossing_sum(const Header& header, int chunk, int last, int stride) {
  double sum = 0;
  GF_NO_UNROLL
  for (; chunk < last; chunk += stride) {
    const ChunkUnits& units = header.chunk_units[chunk];
    if (!units.begins_crossing()) continue;
    const UnitSums sums = sums_of_pieces(header, units.first_piece + units.pieces - 1, 1 + units.beyond, 0, 1);
    sum += clipped_square(sums, unit_factor(header.clip.units, sums, loss_scale_of(header)));
  }
  return sum;
}

// The sum of powers over all elements of all tensors.
GF_DEVICE double total_sum(const Header& header, BlockMemory& memory) {
  if (header.total) return *header.total;
  double sum = 0;
  for (int chunk = thread_index(); chunk < header.chunk_count; chunk += kThreads) {
    sum = join(header.norm, sum, load_shared_by_blocks(header.partials + chunk));
  }
  if (header.chunk_units) sum += crossing_sum(header, thread_index(), header.chunk_count, kThreads);
  return block_join(memory, header.norm, sum);
}

// The chunks' `partials` of one tensor joined, by one warp, in every lane.
GF_DEVICE double join_chunks(const Header& header, const Norm& norm, const double* partials, int tensor) {
  const std::int32_t last = header.tensors[tensor + 1].first_chunk;
  double sum = 0;
  for (int chunk = header.tensors[tensor].first_chunk + lane_index(); chunk < last; chunk += kWarpSize) {
    sum = join(norm, sum, load_shared_by_blocks(partials + chunk));
  }
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum = join(norm, sum, shuffle_xor(sum, mask));
  return sum;
}

// The sum of powers of one tensor, by one warp, in every lane.
GF_DEVICE double tensor_sum(const Header& header, int tensor) {
  const double sum = join_chunks(header, header.norm, header.partials, tensor);
  if (!header.chunk_units) return sum;
  const std::int32_t first = header.tensors[tensor].first_chunk, last = header.tensors[tensor + 1].first_chunk;
  return sum + warp_join<NormTwo>(crossing_sum(header, first + lane_index(), last, kWarpSize));
}

// The first slot whose sum is not finite, or -1. Asked for by one block, and only when something went wrong.
GF_DEVICE std::int32_t first_nonfinite_slot(const Header& header, BlockMemory& memory) {
  constexpr std::int32_t kNone = 0x7fffffff;
  std::int32_t first = kNone;
  for (int tensor = warp_index(); tensor < header.tensor_count; tensor += kWarps) {
    const std::int32_t slot = header.tensors[tensor].slot;
    if (!is_finite(tensor_sum(header, tensor)) && slot < first) first = slot;
  }
  if (lane_index() == 0) memory.minima[warp_index()] = first;
  block_barrier();
  for (int warp = 0; warp < kWarps; ++warp) first = memory.minima[warp] < first ? memory.minima[warp] : first;
  return first == kNone ? -1 : first;
}

GF_DEVICE_CALL ClipDecision decide(const Header& header, double sum) {
  const bool found_infinite = header.found_infinite && *header.found_infinite != 0.0f;
  return decide(header.clip, finish(header.norm, sum), loss_scale_of(header), found_infinite);
}

// The norm of the gradients of one group in memory, by one warp, in every lane.
GF_DEVICE double group_norm(const Header& header, std::int32_t group) {
  double sum = 0;
  GF_NO_UNROLL
  for (int chunk = lane_index(); chunk < header.chunk_count; chunk += kWarpSize) {
    if (header.tensors[header.chunks[chunk].tensor].group != group) continue;
    sum = join(header.norm, sum, load_shared_by_blocks(header.partials + chunk));
    if (header.chunk_units) sum += crossing_sum(header, chunk, chunk + 1, 1);
  }
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum = join(header.norm, sum, shuffle_xor(sum, mask));
  return finish(header.norm, sum);
}

// Update clipping: what the learning rate of a tensor is multiplied with, by one warp.
GF_DEVICE void find_rate(const Header& header, int tensor) {
  double mean;
  if (header.update_means) {
    mean = header.update_means[header.tensors[tensor].number];
  } else {
    const ChunkEntry& end = header.chunks[header.tensors[tensor + 1].first_chunk - 1];  // another's if this is empty
    mean = join_chunks(header, Norm{}, header.update_partials, tensor) / static_cast<double>(end.offset + end.length);
  }
  if (lane_index() == 0) header.tensor_rates[tensor] = rate_for_updates(mean);
}

// Those of all tensors of this block, which may share some with others: these write the same.
GF_DEVICE_CALL void find_rates(const Header& header, Share share) {
  if (share.first < share.last) {
    const std::int32_t last = header.chunks[share.last - 1].tensor;
    for (int t = header.chunks[share.first].tensor + warp_index(); t <= last; t += kWarps) find_rate(header, t);
  }
  block_barrier();
}

// Where tensors have factors of their own (a policy clips each, a group has a limit, or updates are clipped): what the
// gradients of each tensor of this block are multiplied with, and its learning rate, a warp a tensor. Blocks that share
// one write the same. memory.sum is set; the decision is made anew, as that costs less than keeping it in registers.
template <bool kClipsUpdates>
GF_DEVICE_CALL void scale_tensors(const Header& header, Changing changing, BlockMemory& memory, Share share) {
  block_barrier();  // memory.sum is there
  const ClipDecision decision = decide(header, memory.sum);
  const std::int32_t last = share.first < share.last ? header.chunks[share.last - 1].tensor : -1;
  const std::int32_t first = share.first < share.last ? header.chunks[share.first].tensor : 0;
  std::int32_t group = -1;
  double of_group = 1;
  GF_NO_UNROLL
  for (int t = first + warp_index(); t <= last; t += kWarps) {
    const TensorEntry& tensor = header.tensors[t];
    const double sum = header.parameter_sums ? header.parameter_sums[tensor.number] : tensor_sum(header, t);
    const double scale = tensor_scale(header.clip, decision, tensor.number, finish(header.norm, sum));
    if (header.group_limits && tensor.group != group) {
      group = tensor.group;
      of_group = group_coefficient(decision, changing.groups[group].max_norm, group_norm(header, group));
    }
    if (lane_index() == 0) header.tensor_scales[t] = scale * of_group;
    if constexpr (kClipsUpdates) {
      if (header.tensor_rates && !(header.tasks & kUpdatesApart)) find_rate(header, t);
    }
  }
  block_barrier();
}

// Leaves the tensors' sums, shared out among all warps of the grid, and by the first block the report.
GF_DEVICE void write_report(const Header& header, BlockMemory& memory, const ClipDecision& decision, double sum) {
  const bool measured = header.total == nullptr;
  const int first = block_index() * kWarps + warp_index();
  if (measured) {
    for (int tensor = first; tensor < header.tensor_count; tensor += block_count() * kWarps) {
      const double of_tensor = tensor_sum(header, tensor);
      if (lane_index() == 0) header.tensor_sums[header.tensors[tensor].slot] = of_tensor;
    }
  }
  if (header.update_sums) {
    for (int tensor = first; tensor < header.tensor_count; tensor += block_count() * kWarps) {
      const double of_updates = join_chunks(header, Norm{}, header.update_partials, tensor);
      if (lane_index() == 0) header.update_sums[header.tensors[tensor].slot] = of_updates;
    }
  }
  if (block_index() != 0) return;
  const std::int32_t first_nonfinite = measured && !is_finite(sum) ? first_nonfinite_slot(header, memory) : -1;
  if (thread_index() != 0) return;
  Report& report = *header.report;
  if (measured) report.first_nonfinite = first_nonfinite;
  if (header.total != &report.sum) report.sum = sum;
  report.norm = decision.norm;
  report.coefficient = decision.coefficient;
  report.limit = decision.limit;
  report.decider = decision.decider;
  report.found_infinite = is_finite(decision.norm) ? 0.0f : 1.0f;
  if (header.tasks & kCount) {
    report.skipped = decision.skip ? 1 : 0;
    report.skipped_steps += decision.skip ? 1 : 0;
  }
}

// True in every thread of the one block that finishes last: by then all others have read what a step may change, the
// step counters and the policies' state. Every block of the launch must ask, once.
GF_DEVICE bool is_last_block(const Header& header, BlockMemory& memory) {
  block_barrier();
  if (thread_index() == 0) memory.finished_before = count_up(header.finished);
  block_barrier();
  if (memory.finished_before + 1 != static_cast<std::uint32_t>(block_count())) return false;
  if (thread_index() == 0) *header.finished = 0;
  return true;
}

// Leaves what the next step will find: one more update of each tensor of this launch, and the policies' new state. The
// last block does it, after coming to the step's decision once more, as that costs less than keeping it in registers.
// Where several launches share a step each decides from the old state, and the one that counts the step writes the new.
GF_DEVICE_CALL void finish_step(const Header& header, BlockMemory& memory) {
  if (!is_last_block(header, memory)) return;
  const ClipDecision decision = decide(header, memory.sum);
  block_barrier();  // the state is old until everyone has decided
  if ((header.tasks & kCount) && decision.each_tensor) {
    for (int t = thread_index(); t < header.tensor_count; t += kThreads) {
      const TensorEntry& tensor = header.tensors[t];
      const double* sum =
          header.parameter_sums ? header.parameter_sums + tensor.number : header.tensor_sums + tensor.slot;
      advance_tensor(header.clip, decision, tensor.number, finish(header.norm, load_shared_by_blocks(sum)));
    }
    block_barrier();
  }
  if ((header.tasks & kUpdate) && !decision.skip) {
    for (int tensor = header.first_tensor + thread_index(); tensor < header.last_tensor; tensor += kThreads) {
      if (float* step = header.tensors[tensor].step) *step += 1.0f;
    }
  }
  if ((header.tasks & kCount) && thread_index() == 0) advance_policies(header.clip, decision);
}

}  // namespace gradfast::cuda

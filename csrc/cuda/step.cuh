// The kernels. One step is
//
//   phase 1   every block sums the powers of its chunks, and the squares of their updates where those are clipped, and
//             keeps gradients in shared memory while they fit; AGC's units in one chunk get their factors
//   barrier   of the whole grid
//   decision  from the sum of all, the same in every block, after the units that cross chunks have got theirs
//   (sizes    where updates are clipped beside gradients: their squares, and another barrier)
//   phase 2   every block updates its chunks, last read first, which L2 still holds; first read last, which were kept
//
// all in step_kernel where the grid is resident, and otherwise phase 1 in measure_kernel (in step_kernel where it needs
// the rule), the rest in step_kernel.
#pragma once

#include "decide.cuh"
#include "measure_units.cuh"
#include "measure_updates.cuh"
#include "mixed.cuh"
#include "update.cuh"
#include "update_units.cuh"

namespace gradfast::cuda {

// Where the gradients `g` of `chunk` are kept in shared memory, as far from a 16-byte boundary as they are themselves;
// null if they are not.
template <class Storage>
GF_DEVICE Storage* kept_gradients(const ChunkEntry& chunk, const Storage* g) {
  if (chunk.kept < 0) return nullptr;
  const auto past_boundary = static_cast<int>(reinterpret_cast<std::uintptr_t>(g) % kVectorBytes);
  return reinterpret_cast<Storage*>(shared_memory() + sizeof(BlockMemory) + chunk.kept + past_boundary);
}

// Phase 1 of the chunks that are not read as dense vectors. They are few: in a function of their own, their index
// arithmetic takes no registers from the main loop.
template <class Kind, class Storage>
GF_DEVICE_CALL void measure_others(const Header& header, Changing changing, Share share) {
  if (header.layouts) measure_strided_chunks<Kind, Storage>(header, changing, share);
  if constexpr (std::is_same_v<Kind, NormTwo>) {  // the norm that AGC needs
    if (header.chunk_units) measure_units<Storage>(header, changing, share);
  }
}

// Phase 1 of this block. `kept(chunk, g)` says where the chunk's gradients `g` are to be kept, if anywhere.
template <class Kind, class Storage, class Kept>
GF_DEVICE void measure(const Header& header, Changing changing, Share share, Kept kept) {
  measure_chunks<Kind, Storage>(header, changing, share, kept);
  if (header.layouts || header.chunk_units) measure_others<Kind, Storage>(header, changing, share);
}

// Phase 2, likewise.
template <class Rule, class Storage>
GF_DEVICE_CALL void update_others(const Header& header, Changing changing, Share share, double scale,
                                  unsigned char* constants) {
  if (header.layouts) {
    if constexpr (std::is_same_v<Storage, Mixed>) {
      update_mixed_strided<Rule>(header, changing, share, scale, constants);
    } else {
      update_strided_chunks<Rule, Storage>(header, changing, share, scale, constants);
    }
  }
  if (header.chunk_units) update_units<Rule, Storage>(header, changing, share, scale, constants);
}

template <class Rule, class Storage, class Kept>
GF_DEVICE void update(const Header& header, Changing changing, Share share, double scale, unsigned char* constants,
                      Kept kept) {
  if constexpr (std::is_same_v<Storage, Mixed>) {
    update_mixed_dense<Rule>(header, changing, share, scale, constants, kept);
  } else {
    update_chunks<Rule, Storage>(header, changing, share, scale, constants, kept);
  }
  if (header.layouts || header.chunk_units) update_others<Rule, Storage>(header, changing, share, scale, constants);
}

// Phase 1 of this block, as far as this launch has the tasks.
template <class Rule, class Storage, class Kept>
GF_DEVICE void measure_step(const Header& header, Changing changing, BlockMemory& memory, Share share, Kept kept) {
  if constexpr (ClipsUpdates<Rule>) {
    if (header.tasks & kMeasureUpdates) {
      measure_updates<Rule, Storage, false>(header, changing, memory, share, kept);
      return;
    }
  }
  if (header.tasks & kMeasure) {
    measure<NormTwo, Storage>(header, changing, share, kept);
  }
}

template <class Rule, class Storage>
GF_DEVICE void step(const Header& header, const void* after_header) {
  BlockMemory& memory = *reinterpret_cast<BlockMemory*>(shared_memory());
  const Changing changing(header, after_header);
  const Share share(header);
  const bool measures = header.tasks & (kMeasure | kMeasureUpdates);
  const bool both_phases = measures && (header.tasks & kUpdate);
  const auto kept = [both_phases](const ChunkEntry& chunk, const auto* g) {
    return both_phases ? kept_gradients(chunk, g) : nullptr;
  };

  if (measures) {
    measure_step<Rule, Storage>(header, changing, memory, share, kept);
    if (!both_phases) return;
    grid_barrier();
  }
  const double sum = total_sum(header, memory);
  const ClipDecision decision = decide(header, sum);
  if (header.tasks & kReport) write_report(header, memory, decision, sum);
  if (decision.skip && !decision.reached_policies) return;  // nothing changes, not even a policy's state
  if (thread_index() == 0) memory.sum = sum;
  if (header.each_tensor && !decision.skip) scale_tensors<ClipsUpdates<Rule>>(header, changing, memory, share);
  if constexpr (ClipsUpdates<Rule>) {
    if ((header.tasks & kUpdatesApart) && !decision.skip) {
      measure_updates<Rule, Storage, true>(header, changing, memory, share, kept);
      if (!(header.tasks & kUpdate)) return;
      grid_barrier();
      find_rates(header, share);
    }
  }
  if (!decision.skip) {
    update<Rule, Storage>(header, changing, share, decision.scale, memory.constants[warp_index()], kept);
  }
  finish_step(header, memory);
}

// Both phases, or one of them, as header.tasks says.
template <class Rule, class Storage, int kBytes>
GF_KERNEL(kResidentBlocks)
step_kernel(GF_ARGUMENT(Arguments<kBytes>) arguments) {
  step<Rule, Storage>(arguments.header, arguments.changing);
}

// Reading alone needs few registers, except where each tensor may have another format, or all numbers take two.
template <class Storage>
inline constexpr int kMeasuringBlocks =
    std::is_same_v<Storage, Mixed> || std::is_same_v<Storage, double> ? kResidentBlocks : 3;

// Phase 1 alone, for any norm.
template <class Storage, int kBytes>
GF_KERNEL(kMeasuringBlocks<Storage>)
measure_kernel(GF_ARGUMENT(Arguments<kBytes>) arguments) {
  const Header& header = arguments.header;
  const Changing changing(header, arguments.changing);
  const auto nowhere = []<class T>(const ChunkEntry&, const T*) -> T* { return nullptr; };
  with_norm(header.norm.kind,
            [&](auto kind) { measure<decltype(kind), Storage>(header, changing, Share(header), nowhere); });
}

// The report alone, where no update follows the measurement.
template <int kBytes>
GF_KERNEL(3)
report_kernel(GF_ARGUMENT(Arguments<kBytes>) arguments) {
  BlockMemory& memory = *reinterpret_cast<BlockMemory*>(shared_memory());
  const Header& header = arguments.header;
  const double sum = total_sum(header, memory);
  const ClipDecision decision = decide(header, sum);
  write_report(header, memory, decision, sum);
  if (!decision.reached_policies) return;
  if (thread_index() == 0) memory.sum = sum;
  finish_step(header, memory);
}

}  // namespace gradfast::cuda

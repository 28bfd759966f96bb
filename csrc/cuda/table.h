// What a kernel is told: the tables that host and device share. Plain structs, the same bytes on both sides.
//
// Three kinds of facts, by how often they change:
//   - sizes and how the work is cut (ChunkEntry, Layout, the blocks' shares): once per model, in device memory
//   - addresses of parameters, states and step counters (TensorEntry): almost never, in device memory
//   - addresses of gradients, learning rates and other scalars (the changing table): at every step. They travel in
//     the kernel's arguments, which cost no copy; a table too long for that is in device memory as well.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/problem.h"
#include "plan/units.h"

namespace gradfast::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr int kThreads = 256;  // of every block of every kernel
inline constexpr int kWarps = kThreads / kWarpSize;
inline constexpr int kVectorBytes = 16;  // of one load or store of a thread

// One warp's piece of work: a span of one tensor.
struct ChunkEntry {
  std::int32_t tensor;  // index into the table of tensors
  std::int32_t length;  // in elements, at least 1
  std::int64_t offset;  // of the first element, in elements
  std::int32_t kept;    // where in shared memory its gradients stay between the phases, in bytes; -1: nowhere
  std::int32_t unused = 0;
};

// The tensors stand in the order of their kernels and rule, so that every launch works on a run of them.
struct TensorEntry {
  void* arrays[kMaxArrays];  // as in Slot, without the gradient's
  float* step;               // may be null
  std::int32_t group;        // index into the groups of the changing table
  std::int32_t layout;       // as in Slot
  std::int32_t slot;         // where the tensor stands in Problem::slots
  std::int32_t first_chunk;  // its chunks end where the next tensor's begin; an entry more than tensors ends the last
  std::int32_t number;       // as in Slot
  std::int32_t weights;      // as in Slot; -1: not clipped by units
  std::int64_t row_length;   // as in Slot
  Formats formats;           // as in Slot, where the arrays are mixed
};

struct GroupEntry {
  PackedHyperparameters values;
  double max_norm;  // as in Group
  const void* lr;
  std::int32_t lr_is_double;
  std::int32_t unused = 0;
};

enum Task : std::int32_t {
  kMeasure = 1,          // sum the powers of every chunk
  kUpdate = 2,           // apply the rule
  kReport = 4,           // write the report and the tensors' sums
  kCount = 8,            // count a skipped step
  kMeasureUpdates = 16,  // for update clipping: sum the squared updates of every chunk, in phase 1
  kUpdatesApart = 32,    // the same once the clip factors are known
};

// The changing table: first the groups, then the gradients' addresses in the order of the tensors.
struct Header {
  const ChunkEntry* chunks;
  const TensorEntry* tensors;
  const Layout* layouts;
  const std::int32_t* shares;     // block b takes the chunks from shares[b] up to shares[b + 1]
  const void* changing;           // the changing table in device memory; null: it follows the header
  double* partials;               // sum of powers of each chunk
  double* tensor_sums;            // in the order of Problem::slots
  double* tensor_scales;          // in the order of the tensors, where a policy gives each a factor of its own
  double* update_partials;        // update clipping: sum of squared updates of each chunk
  double* tensor_rates;           // update clipping: factors on the learning rates, by tensor; null: none
  double* update_sums;            // where the report leaves the sums of update_partials, as tensor_sums; or null
  const ChunkUnits* chunk_units;  // AGC: the pieces of units in each chunk; null: nothing is clipped by units
  UnitSums* unit_sums;            // AGC: of each piece
  double* unit_factors;           // AGC: of each piece that is a whole unit
  Report* report;
  std::uint32_t* finished;  // blocks of this launch that are done; zero between launches
  const double* total;      // a sum that the caller brings; null: the chunks' partial sums are added up
  const float* loss_scale;
  const float* found_infinite;
  const double* parameter_sums;  // as in Problem
  const double* update_means;    // likewise
  std::uint64_t rounding_seed;
  Norm norm;
  ClipSettings clip;
  std::int32_t each_tensor;   // 1: tensors have factors of their own, see scale_tensors
  std::int32_t group_limits;  // 1: a group has a limit of its own
  std::int32_t tasks;         // of enum Task
  std::int32_t chunk_count;
  std::int32_t tensor_count;
  std::int32_t group_count;
  std::int32_t first_tensor;  // of this launch
  std::int32_t last_tensor;   // one past the end
};

// What the threads of one block tell each other, at the start of its shared memory. The kept gradients follow.
struct alignas(16) BlockMemory {
  double sums[kWarps];
  std::int32_t minima[kWarps];
  std::uint32_t finished_before;
  double sum;                                                       // of all powers, for the block that finishes last
  alignas(16) unsigned char constants[kWarps][kMaxConstantsBytes];  // of the rule, for the tensor of each warp
};

// Arguments of a kernel, of a fixed size: 4 KB everywhere, or the 32,764 bytes of CUDA 12.1 and later.
template <int kBytes>
struct alignas(16) Arguments {
  static constexpr std::size_t kChangingBytes = kBytes - sizeof(Header);
  Header header;
  unsigned char changing[kChangingBytes];
};

inline constexpr int kSmallArguments = 4096;
inline constexpr int kLargeArguments = 32752;  // the largest multiple of 16 under the limit of 32,764

static_assert(sizeof(Arguments<kSmallArguments>) == kSmallArguments);
static_assert(sizeof(Arguments<kLargeArguments>) == kLargeArguments);
static_assert(sizeof(Header) % 8 == 0 && sizeof(GroupEntry) % 8 == 0, "the gradients' addresses must be aligned");

inline std::size_t changing_bytes(std::size_t groups, std::size_t tensors) {
  return groups * sizeof(GroupEntry) + tensors * sizeof(void*);
}

}  // namespace gradfast::cuda

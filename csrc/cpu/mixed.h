// Chunks of tensors whose arrays have different formats (fp32 masters and states beside 16-bit parameters and
// gradients), or are rounded by chance, or are fp16: widened to fp32 a block at a time, through the same loops as
// everything else, and rounded back. The blocks stay in the first-level cache, so memory sees each array once, in its
// own format: a bf16 parameter with an fp32 master and AdamW's two fp32 states moves 30 bytes, norm included.
#pragma once

#include "cpu/kernels.h"
#include "plan/chunk.h"

namespace gradfast::cpu {

// `layout`: of the slot's arrays, null where they are dense. `functions` and `constants` are those for fp32.
void update_mixed(const Slot& slot, const Layout* layout, const Chunk& chunk, const UpdateFunctions& functions,
                  const void* constants, std::uint64_t rounding_seed);

// As functions.square_updates, likewise.
double square_updates_mixed(const Slot& slot, const Layout* layout, const Chunk& chunk,
                            const UpdateFunctions& functions, const void* constants);

}  // namespace gradfast::cpu

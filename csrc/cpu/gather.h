// Chunks of tensors whose arrays are laid out differently: the elements are gathered into small contiguous buffers,
// go through the same loops as everything else, and are scattered back. A few kilobytes of stack, no temporary.
#pragma once

#include "cpu/kernels.h"
#include "plan/chunk.h"

namespace gradfast::cpu {

// The sum of powers of one array, of elements of `size` bytes, each clamped to `limit`.
double measure_gathered(const Slot& slot, const Layout& layout, int array, int size, const Chunk& chunk,
                        MeasureFunction measure, const Norm& norm, double limit);

void update_gathered(const Slot& slot, const Layout& layout, const Chunk& chunk, const UpdateFunctions& functions,
                     const void* constants);

// As functions.square_updates, likewise.
double square_updates_gathered(const Slot& slot, const Layout& layout, const Chunk& chunk,
                               const UpdateFunctions& functions, const void* constants);

}  // namespace gradfast::cpu

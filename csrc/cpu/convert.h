// Between stored formats and floats, a block at a time: the loops of mixed precision, for this machine's instructions.
#pragma once

#include <cstdint>

#include "rules/rounding.h"

namespace gradfast::cpu {

// `to[i]` is the value of stored element i.
void widen_block(Format format, const void* from, float* to, std::int64_t count);

// Stores floats, rounded as `format` says. `random`: a word for each element, of which 16 bits from bit `shift` on are
// used; only for a format that is rounded by chance.
void narrow_block(Format format, const float* from, void* to, std::int64_t count, const std::uint32_t* random,
                  int shift);

// The random words of elements `first` to `first + count - 1`; `first` is a multiple of four, and so many words are
// written that the last quad is complete.
void random_block(const RoundingKey& key, int pair, std::int64_t first, std::int64_t count, std::uint32_t* to);

}  // namespace gradfast::cpu

// Where the elements of one tensor lie in memory, for each of the arrays that a rule touches.
//
// Element number i of a parameter, of its gradient and of its states must be the same element of the tensor, also
// where they are laid out differently (a transposed gradient, a view with gaps, an expanded gradient of stride 0).
// When all arrays share one dense layout, memory order serves for all and no Layout is made. Otherwise a Layout counts
// the elements row-major over `sizes` and finds each with that array's own strides.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "rules/rules.h"

namespace gradfast {

// The parameter, its gradient, its states, and the low-precision copy of a master parameter.
inline constexpr int kMaxArrays = 2 + kMaxStates + 1;
inline constexpr int kMaxDimensions = 8;  // after coalescing

struct Layout {
  int dimensions = 0;
  int arrays = 0;
  std::int64_t sizes[kMaxDimensions] = {};                // outermost first
  std::int64_t strides[kMaxArrays][kMaxDimensions] = {};  // in elements

  bool operator==(const Layout&) const = default;

  // Position of element `index` in array `array`, in elements from its first.
  GF_HOST_DEVICE std::int64_t offset(std::int64_t index, int array) const {
    std::int64_t position = 0;
    GF_NO_UNROLL
    for (int d = dimensions - 1; d >= 0; --d) {
      const std::int64_t outer = index / sizes[d];
      position += (index - outer * sizes[d]) * strides[array][d];
      index = outer;
    }
    return position;
  }
};

// True when neighbouring dimensions `outer` and `inner` can be walked as one in every array.
inline bool mergeable(const std::vector<std::vector<std::int64_t>>& strides, std::int64_t inner_size, std::size_t outer,
                      std::size_t inner) {
  for (const auto& array : strides) {
    if (array[outer] != array[inner] * inner_size) return false;
  }
  return true;
}

// The Layout of arrays of the same `sizes` with `strides[array][dimension]`, in as few dimensions as possible. Returns
// false if more than kMaxDimensions are left.
inline bool make_layout(const std::vector<std::int64_t>& sizes, const std::vector<std::vector<std::int64_t>>& strides,
                        Layout* layout) {
  *layout = Layout{};
  layout->arrays = static_cast<int>(strides.size());
  int last = -1;
  std::size_t previous = 0;
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    if (last >= 0 && mergeable(strides, sizes[d], previous, d)) {
      layout->sizes[last] *= sizes[d];
    } else {
      if (++last == kMaxDimensions) return false;
      layout->sizes[last] = sizes[d];
    }
    for (std::size_t a = 0; a < strides.size(); ++a) layout->strides[a][last] = strides[a][d];
    previous = d;
  }
  layout->dimensions = last + 1;
  return true;
}

}  // namespace gradfast

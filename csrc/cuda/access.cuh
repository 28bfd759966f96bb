// How device code gets at things: the tables, and elements 16 bytes at a time.
#pragma once

#include <cstring>
#include <type_traits>

#include "intrinsics.cuh"
#include "rules/precision.h"

namespace gradfast::cuda {

// The changing table, of which the gradients follow the groups.
struct Changing {
  const GroupEntry* groups;
  void* const* gradients;

  GF_DEVICE Changing(const Header& header, const void* after_header) {
    groups = static_cast<const GroupEntry*>(header.changing ? header.changing : after_header);
    gradients = reinterpret_cast<void* const*>(groups + header.group_count);
  }
};

GF_DEVICE double loss_scale_of(const Header& header) {
  return header.loss_scale ? static_cast<double>(*header.loss_scale) : 1.0;
}

// The chunks of one block.
struct Share {
  std::int32_t first, last;

  GF_DEVICE explicit Share(const Header& header)
      : first(header.shares[block_index()]), last(header.shares[block_index() + 1]) {}
};

// Which loops take a tensor: those over dense arrays, or those over elements that a Layout finds; or, where it is
// clipped by units, those of measure_units.cuh and update_units.cuh.
GF_DEVICE bool is_dense(const TensorEntry& tensor) { return tensor.layout < 0 && tensor.weights < 0; }
GF_DEVICE bool is_strided(const TensorEntry& tensor) { return tensor.layout >= 0 && tensor.weights < 0; }

// Stands for the storage type of tensors whose arrays have several: TensorEntry::formats says which. Computed in fp32.
struct Mixed {};

// Calls `function` with the gradients of a tensor as what they are stored in.
template <class Storage, class Function>
GF_DEVICE double with_gradients(const TensorEntry& tensor, const void* gradients, Function function) {
  if constexpr (std::is_same_v<Storage, Mixed>) {
    switch (tensor.formats.array[kGradient]) {
      case Format::float16:
        return function(static_cast<const Half*>(gradients));
      case Format::bfloat16:
        return function(static_cast<const BFloat16*>(gradients));
      default:
        return function(static_cast<const float*>(gradients));
    }
  } else {
    return function(static_cast<const Storage*>(gradients));
  }
}

template <class Storage>
inline constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(Storage));  // elements of one access

template <class Storage>
struct alignas(kVectorBytes) Vector {
  Storage element[kVector<Storage>];
};

template <class Storage>
GF_DEVICE Vector<Storage> vector_of(Bits128 bits) {
  Vector<Storage> vector;
  std::memcpy(&vector, &bits, sizeof vector);
  return vector;
}

template <class Storage>
GF_DEVICE Bits128 bits_of_vector(const Vector<Storage>& vector) {
  Bits128 bits;
  std::memcpy(&bits, &vector, sizeof bits);
  return bits;
}

// How many elements lie before the first that is aligned to 16 bytes.
template <class Storage>
GF_DEVICE int elements_to_alignment(const Storage* address) {
  const auto past = static_cast<int>(reinterpret_cast<std::uintptr_t>(address) % kVectorBytes);
  return (kVectorBytes - past) % kVectorBytes / static_cast<int>(sizeof(Storage));
}

template <class Storage>
GF_DEVICE bool is_aligned(const Storage* address) {
  return reinterpret_cast<std::uintptr_t>(address) % kVectorBytes == 0;
}

// A span of elements as a warp walks it: `head` single ones, `vectors` whole vectors, and single ones to the end. The
// head and the tail together are fewer than the lanes, one element a lane.
template <class Storage>
struct Span {
  int head, vectors, length;

  GF_DEVICE Span(const Storage* first, int length) : length(length) {
    const int to_alignment = elements_to_alignment(first);
    head = to_alignment < length ? to_alignment : length;
    vectors = (length - head) / kVector<Storage>;
  }

  // The element outside of all vectors that belongs to `lane`; -1: none.
  GF_DEVICE int single(int lane) const {
    const int element = lane < head ? lane : lane + vectors * kVector<Storage>;
    return element < length ? element : -1;
  }
};

static_assert(2 * (kVector<Half> - 1) < kWarpSize, "head and tail must be covered by one warp");

}  // namespace gradfast::cuda

// What csrc/cuda/intrinsics.cuh takes from the CUDA compiler, for a C++ compiler. Included by that file alone.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "fake_runtime.h"
#include "fibres.h"

#define GF_DEVICE inline
#define GF_DEVICE_CALL [[maybe_unused]] static
#define GF_KERNEL(blocks) void
#define GF_ARGUMENT(...) const __VA_ARGS__&
#define GF_UNROLL

namespace gradfast::cuda {

using shim::Where;

inline int thread_index() { return shim::thread_index(); }
inline int block_index() { return shim::block_index(); }
inline int block_count() { return shim::block_count(); }
inline unsigned char* shared_memory() { return shim::shared_memory(); }

inline void warp_barrier(const Where& where = Where::current()) { shim::warp_barrier(where); }
inline void block_barrier(const Where& where = Where::current()) { shim::block_barrier(where); }
inline void grid_barrier(const Where& where = Where::current()) { shim::grid_barrier(where); }

inline double shuffle_xor(double value, int mask, const Where& where = Where::current()) {
  return std::bit_cast<double>(shim::exchange(std::bit_cast<std::uint64_t>(value), mask, where));
}

struct alignas(16) Bits128 {
  std::uint32_t word[4];
};

inline Bits128 load_bits(const void* address, const Where& where = Where::current()) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) shim::fail("misaligned 16-byte load", where);
  Bits128 bits;
  std::memcpy(&bits, address, sizeof bits);
  return bits;
}
inline Bits128 load_bits_streaming(const void* address, const Where& where = Where::current()) {
  return load_bits(address, where);
}
inline void store_bits(void* address, Bits128 bits, const Where& where = Where::current()) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) shim::fail("misaligned 16-byte store", where);
  std::memcpy(address, &bits, sizeof bits);
}
inline void store_bits_streaming(void* address, Bits128 bits, const Where& where = Where::current()) {
  store_bits(address, bits, where);
}

struct alignas(8) Bits64 {
  std::uint32_t word[2];
};

inline Bits64 load_bits64(const void* address, const Where& where = Where::current()) {
  if (reinterpret_cast<std::uintptr_t>(address) % 8 != 0) shim::fail("misaligned 8-byte load", where);
  Bits64 bits;
  std::memcpy(&bits, address, sizeof bits);
  return bits;
}
inline Bits64 load_bits64_streaming(const void* address, const Where& where = Where::current()) {
  return load_bits64(address, where);
}
inline void store_bits64_streaming(void* address, Bits64 bits, const Where& where = Where::current()) {
  if (reinterpret_cast<std::uintptr_t>(address) % 8 != 0) shim::fail("misaligned 8-byte store", where);
  std::memcpy(address, &bits, sizeof bits);
}

inline double load_shared_by_blocks(const double* address) { return *address; }

// All fibres share one CPU thread, so the count is exact; others run before the caller learns of it.
inline std::uint32_t count_up(std::uint32_t* counter) {
  const std::uint32_t before = (*counter)++;
  shim::yield();
  return before;
}

template <class Argument>
Argument argument_of(void (*)(const Argument&));

template <auto kKernel>
const void* kernel_address() {
  using Argument = decltype(argument_of(kKernel));
  return shim::register_kernel(reinterpret_cast<const void*>(kKernel), sizeof(Argument),
                               [](const void* argument) { kKernel(*static_cast<const Argument*>(argument)); });
}

}  // namespace gradfast::cuda

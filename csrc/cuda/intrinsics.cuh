// Everything that the CUDA compiler offers and a C++ compiler does not, under names of our own: the only file of
// device code that asks which of the two is reading it. Under g++ the same names come from a simulator that runs every
// CUDA thread as a fibre (tests/device/shim), so that the kernels are tested where there is no GPU.
#pragma once

#include <cstdint>

#include "table.h"

#if defined(__CUDACC__)

#include <cooperative_groups.h>

#define GF_DEVICE __device__ __forceinline__
// For code off the main path: its registers are not added to those of the loop that calls it.
#define GF_DEVICE_CALL static __device__ __noinline__
// A kernel of which `blocks` blocks are to fit on a multiprocessor: 80 registers a thread for 3 blocks, 128 for 2.
#define GF_KERNEL(blocks) __global__ void __launch_bounds__(::gradfast::cuda::kThreads, blocks)
// A kernel's one argument: read only, in constant memory, its address may be taken.
#define GF_ARGUMENT(...) const __grid_constant__ __VA_ARGS__
#define GF_UNROLL _Pragma("unroll")

namespace gradfast::cuda {

GF_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
GF_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
GF_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

// The block's dynamic shared memory, aligned to 16 bytes.
GF_DEVICE unsigned char* shared_memory() {
  extern __shared__ uint4 gradfast_shared[];
  return reinterpret_cast<unsigned char*>(gradfast_shared);
}

GF_DEVICE void warp_barrier() { __syncwarp(); }
GF_DEVICE void block_barrier() { __syncthreads(); }
// Needs a cooperative launch. What any thread wrote before it, every thread reads after it.
GF_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }

// The value of the lane whose index differs in the bits of `mask`. All lanes of the warp must call it.
GF_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

struct alignas(16) Bits128 {
  std::uint32_t word[4];
};

// One 16-byte access. `streaming`: used once, so that the cache may drop it first.
GF_DEVICE Bits128 load_bits(const void* address) {
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
}
GF_DEVICE Bits128 load_bits_streaming(const void* address) {
  const uint4 v = __ldcs(static_cast<const uint4*>(address));
  return {{v.x, v.y, v.z, v.w}};
}
GF_DEVICE void store_bits(void* address, Bits128 b) {
  *static_cast<uint4*>(address) = make_uint4(b.word[0], b.word[1], b.word[2], b.word[3]);
}
GF_DEVICE void store_bits_streaming(void* address, Bits128 b) {
  __stcs(static_cast<uint4*>(address), make_uint4(b.word[0], b.word[1], b.word[2], b.word[3]));
}

struct alignas(8) Bits64 {
  std::uint32_t word[2];
};

// The same with 8 bytes.
GF_DEVICE Bits64 load_bits64(const void* address) {
  const uint2 v = *static_cast<const uint2*>(address);
  return {{v.x, v.y}};
}
GF_DEVICE Bits64 load_bits64_streaming(const void* address) {
  const uint2 v = __ldcs(static_cast<const uint2*>(address));
  return {{v.x, v.y}};
}
GF_DEVICE void store_bits64_streaming(void* address, Bits64 b) {
  __stcs(static_cast<uint2*>(address), make_uint2(b.word[0], b.word[1]));
}

// A value that another block wrote before the grid barrier: from the cache that all share.
GF_DEVICE double load_shared_by_blocks(const double* address) { return __ldcg(address); }

// Adds one and returns the count before; what this thread wrote earlier is visible to whoever sees the new count.
GF_DEVICE std::uint32_t count_up(std::uint32_t* counter) {
  __threadfence();
  const std::uint32_t before = atomicAdd(counter, 1u);
  __threadfence();
  return before;
}

// The address by which the host launches a kernel.
template <auto kKernel>
const void* kernel_address() {
  return reinterpret_cast<const void*>(kKernel);
}

}  // namespace gradfast::cuda

#else

#include "device_shim.h"

#endif

namespace gradfast::cuda {

GF_DEVICE int lane_index() { return thread_index() % kWarpSize; }
GF_DEVICE int warp_index() { return thread_index() / kWarpSize; }

}  // namespace gradfast::cuda

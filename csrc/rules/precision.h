// Storage types and the arithmetic type that each is computed in.
//
// A parameter may be stored in 16, 32 or 64 bits; every rule computes in fp32, or in fp64 for fp64 storage.
// `widen` reads a stored value, `narrow` rounds a computed one to nearest-even. The host versions are plain integer
// arithmetic without branches, so that the compiler turns a loop over them into vector code on any instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GF_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Rules are inlined into loops compiled for several instruction sets: an out-of-line copy would be compiled for one.
#define GF_HOST_DEVICE inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
// On a GPU an unrolled loop of unknown length takes registers that the main loops need.
#define GF_NO_UNROLL _Pragma("unroll 1")
#else
#define GF_NO_UNROLL
#endif

namespace gradfast {

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

template <class Storage>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class Storage>
using Arithmetic = typename ArithmeticOf<Storage>::type;

GF_HOST_DEVICE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

GF_HOST_DEVICE float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

GF_HOST_DEVICE double widen(double value) { return value; }
GF_HOST_DEVICE float widen(float value) { return value; }

// bfloat16 is the upper half of a float.
GF_HOST_DEVICE float widen(BFloat16 value) { return float_of(static_cast<std::uint32_t>(value.bits) << 16); }

GF_HOST_DEVICE float widen(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Shift exponent and mantissa into float's places; the product with 2^112 moves the exponent's bias from 15 to 127
  // and makes subnormals normal. Infinity and NaN keep an all-ones exponent.
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const std::uint32_t special = (magnitude << 13) | 0x7f800000u;
  return float_of((magnitude >= 0x7c00u ? special : finite) | sign);
#endif
}

template <class Storage, class Value>
GF_HOST_DEVICE Storage narrow(Value value);

template <>
GF_HOST_DEVICE double narrow<double, double>(double value) {
  return value;
}

template <>
GF_HOST_DEVICE float narrow<float, float>(float value) {
  return value;
}

template <>
GF_HOST_DEVICE BFloat16 narrow<BFloat16, float>(float value) {
#if defined(__CUDA_ARCH__)
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // ties go to the even neighbour
  // One shift for both, last: chosen among 16-bit values, a NaN would have to be packed and unpacked by vector code.
  return BFloat16{static_cast<std::uint16_t>((value != value ? bits | 0x400000u : rounded) >> 16)};
#endif
}

template <>
GF_HOST_DEVICE Half narrow<Half, float>(float value) {
#if defined(__CUDA_ARCH__)
  return Half{__half_as_ushort(__float2half_rn(value))};
#else
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Normal: rebias the exponent by -112 and round the 13 bits that fall off to nearest-even.
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal: adding 0.5 lines the value up with half's last place, and the float adder does the rounding.
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t nan_or_infinity = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? nan_or_infinity : half;  // 65520 and above round to infinity
  return Half{static_cast<std::uint16_t>(half | sign)};
#endif
}

}  // namespace gradfast

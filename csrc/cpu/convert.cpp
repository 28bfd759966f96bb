#include "cpu/convert.h"

#include "cpu/instruction_set.h"

#if GF_X86
#include <immintrin.h>
#endif

namespace gradfast::cpu {
namespace {

// Each loop offers `run`, compiled for the three instruction sets by Compiled<Loop>.
template <class T>
struct Widen {
  static GF_HOST_DEVICE void run(const void* from, float* __restrict to, std::int64_t count) {
    const T* stored = static_cast<const T*>(from);
    for (std::int64_t i = 0; i < count; ++i) to[i] = widen(stored[i]);
  }
};

template <class T>
struct Narrow {
  static GF_HOST_DEVICE void run(const float* __restrict from, void* to, std::int64_t count) {
    T* stored = static_cast<T*>(to);
    for (std::int64_t i = 0; i < count; ++i) stored[i] = narrow<T>(from[i]);
  }
};

template <class T>
struct NarrowByChance {
  static GF_HOST_DEVICE void run(const float* __restrict from, void* to, std::int64_t count,
                                 const std::uint32_t* __restrict random, int shift) {
    T* stored = static_cast<T*>(to);
    for (std::int64_t i = 0; i < count; ++i) {
      stored[i] = narrow_by_chance<T>(from[i], (random[i] >> shift) & 0xffffu);
    }
  }
};

struct Random {
  static GF_HOST_DEVICE void run(const RoundingKey& key, int pair, std::int64_t first_quad, std::int64_t quads,
                                 std::uint32_t* __restrict to) {
#pragma GCC ivdep
    for (std::int64_t q = 0; q < quads; ++q) {
      const RandomWords words = random_words(key, first_quad + q, pair);
      for (int w = 0; w < 4; ++w) to[4 * q + w] = words.word[w];
    }
  }
};

template <class Loop, class... Arguments>
struct Compiled {
  static void baseline(Arguments... arguments) { Loop::run(arguments...); }
  GF_TARGET_AVX2 static void avx2(Arguments... arguments) { Loop::run(arguments...); }
  GF_TARGET_AVX512 static void avx512(Arguments... arguments) { Loop::run(arguments...); }
};

#if GF_X86
// Every machine with AVX2 converts fp16 in hardware. Compilers do not find that in the loops above, whose integer
// arithmetic takes four times as long. (The masks that leave nothing out are for GCC 12, which warns of a variable in
// its own headers without them.)
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
constexpr __mmask16 kAllLanes = 0xffff;

template <>
struct Compiled<Widen<Half>, const void*, float*, std::int64_t> {
  static void baseline(const void* from, float* to, std::int64_t count) { Widen<Half>::run(from, to, count); }
  GF_TARGET_AVX2 static void avx2(const void* from, float* to, std::int64_t count) {
    const auto* stored = static_cast<const Half*>(from);
    for (; count >= 8; count -= 8, stored += 8, to += 8) {
      _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(stored))));
    }
    Widen<Half>::run(stored, to, count);
  }
  GF_TARGET_AVX512 static void avx512(const void* from, float* to, std::int64_t count) {
    const auto* stored = static_cast<const Half*>(from);
    for (; count >= 16; count -= 16, stored += 16, to += 16) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored));
      _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(kAllLanes, halves));
    }
    Widen<Half>::run(stored, to, count);
  }
};

template <>
struct Compiled<Narrow<Half>, const float*, void*, std::int64_t> {
  static void baseline(const float* from, void* to, std::int64_t count) { Narrow<Half>::run(from, to, count); }
  GF_TARGET_AVX2 static void avx2(const float* from, void* to, std::int64_t count) {
    auto* stored = static_cast<Half*>(to);
    for (; count >= 8; count -= 8, stored += 8, from += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(stored), _mm256_cvtps_ph(_mm256_loadu_ps(from), kNearest));
    }
    Narrow<Half>::run(from, stored, count);
  }
  GF_TARGET_AVX512 static void avx512(const float* from, void* to, std::int64_t count) {
    auto* stored = static_cast<Half*>(to);
    for (; count >= 16; count -= 16, stored += 16, from += 16) {
      const __m256i halves = _mm512_maskz_cvtps_ph(kAllLanes, _mm512_loadu_ps(from), kNearest);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(stored), halves);
    }
    Narrow<Half>::run(from, stored, count);
  }
};
#endif

template <class Loop, class... Arguments>
void run(Arguments... arguments) {
  static const auto best = best_of<Compiled<Loop, Arguments...>>();
  best(arguments...);
}

}  // namespace

void widen_block(Format format, const void* from, float* to, std::int64_t count) {
  switch (format) {
    case Format::float16:
    case Format::float16_by_chance:
      return run<Widen<Half>>(from, to, count);
    case Format::bfloat16:
    case Format::bfloat16_by_chance:
      return run<Widen<BFloat16>>(from, to, count);
    case Format::float32:
      return run<Widen<float>>(from, to, count);
  }
}

void narrow_block(Format format, const float* from, void* to, std::int64_t count, const std::uint32_t* random,
                  int shift) {
  switch (format) {
    case Format::float16:
      return run<Narrow<Half>>(from, to, count);
    case Format::bfloat16:
      return run<Narrow<BFloat16>>(from, to, count);
    case Format::float16_by_chance:
      return run<NarrowByChance<Half>>(from, to, count, random, shift);
    case Format::bfloat16_by_chance:
      return run<NarrowByChance<BFloat16>>(from, to, count, random, shift);
    case Format::float32:
      return run<Narrow<float>>(from, to, count);
  }
}

void random_block(const RoundingKey& key, int pair, std::int64_t first, std::int64_t count, std::uint32_t* to) {
  run<Random, const RoundingKey&>(key, pair, first / 4, (count + 3) / 4, to);
}

}  // namespace gradfast::cpu

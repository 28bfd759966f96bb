#include "cpu/convert.h"

#include "cpu/instruction_set.h"

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

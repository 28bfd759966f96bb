// How a computed float becomes a stored one: the formats that arrays of one tensor may differ in, and rounding by
// chance.
//
// To nearest, an update below half a unit of the last place is lost, every time. Rounded by chance, a value goes up
// with the probability of its distance from the lower neighbour, so that its expectation is the value itself and small
// updates add up (Gupta et al. 2015). The random bits come from a counter-based generator (Philox4x32-10, Salmon et al.
// 2011): they are a function of seed, step, parameter and element alone, whatever the threads, chunks or device.
#pragma once

#include "rules/precision.h"

namespace gradfast {

// Of one array of a tensor whose arrays differ; all are computed in fp32. The last two are rounded by chance.
enum class Format : std::uint8_t { float32, float16, bfloat16, float16_by_chance, bfloat16_by_chance };

GF_HOST_DEVICE bool is_by_chance(Format format) { return format >= Format::float16_by_chance; }
GF_HOST_DEVICE int size_of(Format format) { return format == Format::float32 ? 4 : 2; }

// ---- random bits ---------------------------------------------------------------------------------------------------

// What the random bits of a parameter in one step are drawn by, beside the element's number.
struct RoundingKey {
  std::uint64_t seed;
  std::uint32_t step;    // updates of this parameter before this one
  std::uint32_t number;  // of the parameter in its optimiser
};

struct RandomWords {
  std::uint32_t word[4];
};

// Philox4x32-10 of the counter `c` and a 64-bit key.
GF_HOST_DEVICE RandomWords philox(RandomWords c, std::uint64_t key) {
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xd2511f53u} * c.word[0];
    const std::uint64_t b = std::uint64_t{0xcd9e8d57u} * c.word[2];
    c = {{static_cast<std::uint32_t>(b >> 32) ^ c.word[1] ^ k0, static_cast<std::uint32_t>(b),
          static_cast<std::uint32_t>(a >> 32) ^ c.word[3] ^ k1, static_cast<std::uint32_t>(a)}};
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return c;
}

// One word for each of the elements 4 * quad to 4 * quad + 3. Its halves serve two of the arrays that are written:
// `pair` 0 the parameter (lower half) and the first state, `pair` 1 the second and the third state.
GF_HOST_DEVICE RandomWords random_words(const RoundingKey& key, std::int64_t quad, int pair) {
  const auto high = static_cast<std::uint32_t>(static_cast<std::uint64_t>(quad) >> 32);
  return philox(
      {{static_cast<std::uint32_t>(quad), high | static_cast<std::uint32_t>(pair) << 31, key.step, key.number}},
      key.seed);
}

// The word of element `element` alone.
GF_HOST_DEVICE std::uint32_t random_word(const RoundingKey& key, std::int64_t element, int pair) {
  const RandomWords words = random_words(key, element / 4, pair);
  const int place = static_cast<int>(element % 4);
  const std::uint32_t low = place == 0 ? words.word[0] : words.word[1];
  const std::uint32_t high = place == 2 ? words.word[2] : words.word[3];
  return place < 2 ? low : high;
}

// ---- rounding by chance --------------------------------------------------------------------------------------------

// Rounds up in magnitude with the probability of the distance from the lower neighbour, exactly; `random` has 16 bits.
// From the largest finite number on, to nearest: nothing finite becomes infinite by chance.
template <class Storage>
GF_HOST_DEVICE Storage narrow_by_chance(float value, std::uint32_t random);

template <>
GF_HOST_DEVICE BFloat16 narrow_by_chance<BFloat16>(float value, std::uint32_t random) {
  const std::uint32_t bits = bits_of(value);
  const bool in_range = (bits & 0x7fffffffu) < 0x7f7f0000u;
  const std::uint32_t rounded = (bits + random) >> 16;  // carries in `random` of 65536 cases
  return BFloat16{in_range ? static_cast<std::uint16_t>(rounded) : narrow<BFloat16>(value).bits};
}

// All ones if x < limit, both below 2^31. A mask and no condition: compilers turn selects into branches where one side
// is long, and a loop with branches is not vectorised.
GF_HOST_DEVICE std::uint32_t mask_below(std::uint32_t x, std::uint32_t limit) {
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(x - limit) >> 31);
}

template <>
GF_HOST_DEVICE Half narrow_by_chance<Half>(float value, std::uint32_t random) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Normal: rebias the exponent by -112; 13 bits fall off, and as many random ones may carry.
  const std::uint32_t normal = (magnitude - 0x38000000u + (random >> 3)) >> 13;
  // Subnormal, in units of the smallest: the fraction is compared with the middle of one of 65536 intervals, and the
  // probability of rounding up is right to 2^-17.
  const std::uint32_t is_subnormal = mask_below(magnitude, 0x38800000u);
  const float units = float_of(magnitude & is_subnormal) * 0x1p24f;
  const auto whole = static_cast<std::int32_t>(units);
  const float fraction = units - static_cast<float>(whole);
  const float threshold = (static_cast<float>(static_cast<std::int32_t>(random)) + 0.5f) * 0x1p-16f;
  const std::uint32_t subnormal = static_cast<std::uint32_t>(whole) + (bits_of(threshold - fraction) >> 31);
  // To nearest beyond: 65504 up to the middle between it and 65536, then infinity.
  const std::uint32_t nan_or_infinity = 0x7c00u | (0x200u & ~mask_below(magnitude, 0x7f800001u));
  const std::uint32_t is_largest = mask_below(magnitude, 0x477ff000u), in_range = mask_below(magnitude, 0x477fe000u);
  const std::uint32_t beyond = (0x7bffu & is_largest) | (nan_or_infinity & ~is_largest);
  const std::uint32_t finite = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  return Half{static_cast<std::uint16_t>((finite & in_range) | (beyond & ~in_range) | sign)};
}

}  // namespace gradfast

// Phase 2 of tensors whose arrays have different formats, or are rounded by chance: fp32 masters and states beside
// 16-bit parameters and gradients. One kernel a rule; what an array is stored in is asked at run time, which is the
// same for all lanes of a warp and costs a predictable branch beside each access to memory.
//
// A lane takes four neighbouring elements: 16 bytes of fp32, 8 of a 16-bit format, whole sectors for the warp in both.
// AdamW on a bf16 parameter with an fp32 master moves 28 bytes a parameter: master, m and v read and written, g read,
// the parameter written; phase 1 reads g once more.
#pragma once

#include "update.cuh"

namespace gradfast::cuda {

inline constexpr int kQuad = 4;  // elements

// One array of a tensor, from some element on.
struct MixedArray {
  unsigned char* first;
  Format format;

  GF_DEVICE MixedArray(void* start, Format format, std::int64_t offset)
      : first(static_cast<unsigned char*>(start) + offset * size_of(format)), format(format) {}

  GF_DEVICE unsigned char* at(std::int64_t element) const { return first + element * size_of(format); }

  // True if every quad can be accessed at once.
  GF_DEVICE bool is_aligned() const { return reinterpret_cast<std::uintptr_t>(first) % (kQuad * size_of(format)) == 0; }
};

// ---- single elements -----------------------------------------------------------------------------------------------

GF_DEVICE float load_one(const MixedArray& array, std::int64_t element) {
  const unsigned char* at = array.at(element);
  if (array.format == Format::float32) return *reinterpret_cast<const float*>(at);
  const std::uint16_t bits = *reinterpret_cast<const std::uint16_t*>(at);
  const bool half = array.format == Format::float16 || array.format == Format::float16_by_chance;
  return half ? widen(Half{bits}) : widen(BFloat16{bits});
}

// A value as it is stored; `random` has 16 bits.
GF_DEVICE std::uint32_t stored_bits(Format format, float value, std::uint32_t random) {
  switch (format) {
    case Format::float16:
      return narrow<Half>(value).bits;
    case Format::bfloat16:
      return narrow<BFloat16>(value).bits;
    case Format::float16_by_chance:
      return narrow_by_chance<Half>(value, random).bits;
    case Format::bfloat16_by_chance:
      return narrow_by_chance<BFloat16>(value, random).bits;
    default:
      return bits_of(value);
  }
}

GF_DEVICE void store_one(const MixedArray& array, std::int64_t element, float value, std::uint32_t random) {
  const std::uint32_t bits = stored_bits(array.format, value, random);
  if (array.format == Format::float32) {
    *reinterpret_cast<std::uint32_t*>(array.at(element)) = bits;
  } else {
    *reinterpret_cast<std::uint16_t*>(array.at(element)) = static_cast<std::uint16_t>(bits);
  }
}

// An array of any storage, from its element `offset` on. `format` counts where the storage is mixed.
template <class Storage>
GF_DEVICE auto array_from(const void* start, Format format, std::int64_t offset) {
  if constexpr (std::is_same_v<Storage, Mixed>) {
    return MixedArray(const_cast<void*>(start), format, offset);
  } else {
    return static_cast<const Storage*>(start) + offset;
  }
}

template <class Storage>
GF_DEVICE Arithmetic<Storage> load_one(const Storage* array, std::int64_t element) {
  return static_cast<Arithmetic<Storage>>(widen(array[element]));
}

// ---- four elements -------------------------------------------------------------------------------------------------

// As they are stored: four words, or two. `streaming` where it is read once, from global memory.
GF_DEVICE Bits128 load_quad(const MixedArray& array, int element, bool aligned, bool streaming) {
  const unsigned char* at = array.at(element);
  Bits128 bits{};
  if (array.format == Format::float32) {
    if (aligned) return streaming ? load_bits_streaming(at) : load_bits(at);
    GF_UNROLL
    for (int e = 0; e < kQuad; ++e) bits.word[e] = reinterpret_cast<const std::uint32_t*>(at)[e];
  } else if (aligned) {
    const Bits64 pair = streaming ? load_bits64_streaming(at) : load_bits64(at);
    bits.word[0] = pair.word[0];
    bits.word[1] = pair.word[1];
  } else {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(at);
    bits.word[0] = halves[0] | static_cast<std::uint32_t>(halves[1]) << 16;
    bits.word[1] = halves[2] | static_cast<std::uint32_t>(halves[3]) << 16;
  }
  return bits;
}

GF_DEVICE void store_quad(const MixedArray& array, int element, bool aligned, Bits128 bits) {
  unsigned char* at = array.at(element);
  if (array.format == Format::float32) {
    if (aligned) return store_bits_streaming(at, bits);
    GF_UNROLL
    for (int e = 0; e < kQuad; ++e) reinterpret_cast<std::uint32_t*>(at)[e] = bits.word[e];
  } else if (aligned) {
    store_bits64_streaming(at, {{bits.word[0], bits.word[1]}});
  } else {
    auto* halves = reinterpret_cast<std::uint16_t*>(at);
    GF_UNROLL
    for (int e = 0; e < kQuad; ++e) halves[e] = static_cast<std::uint16_t>(bits.word[e / 2] >> (e % 2 * 16));
  }
}

struct Quad {
  float value[kQuad];
};

GF_DEVICE Quad widen_quad(Format format, Bits128 bits) {
  Quad quad;
  const bool half = format == Format::float16 || format == Format::float16_by_chance;
  GF_UNROLL
  for (int e = 0; e < kQuad; ++e) {
    const auto narrow_bits = static_cast<std::uint16_t>(bits.word[e / 2] >> (e % 2 * 16));
    quad.value[e] = format == Format::float32 ? float_of(bits.word[e])
                    : half                    ? widen(Half{narrow_bits})
                                              : widen(BFloat16{narrow_bits});
  }
  return quad;
}

GF_DEVICE Bits128 narrow_quad(Format format, const Quad& quad, const RandomWords& random, int shift) {
  std::uint32_t stored[kQuad];
  GF_UNROLL
  for (int e = 0; e < kQuad; ++e) stored[e] = stored_bits(format, quad.value[e], (random.word[e] >> shift) & 0xffffu);
  if (format == Format::float32) return {{stored[0], stored[1], stored[2], stored[3]}};
  return {{stored[0] | stored[1] << 16, stored[2] | stored[3] << 16, 0, 0}};
}

// ---- a chunk -------------------------------------------------------------------------------------------------------

// What a warp needs of a tensor, from element `offset` on.
template <class Rule>
struct MixedTensor {
  static constexpr int kArrays = kFirstState + Rule::kStates;

  const TensorEntry& entry;
  RoundingKey key;
  bool draws[2];  // random words of either pair

  GF_DEVICE MixedTensor(const Header& header, const TensorEntry& entry) : entry(entry) {
    key = {header.rounding_seed, static_cast<std::uint32_t>(entry.step ? *entry.step : 0.0f),
           static_cast<std::uint32_t>(entry.number)};
    const auto by_chance = [&](int array) { return array < kArrays && is_by_chance(entry.formats.array[array]); };
    draws[0] = by_chance(kParameter) || by_chance(kFirstState);
    draws[1] = by_chance(kFirstState + 1) || by_chance(kFirstState + 2);
  }

  GF_DEVICE MixedArray array(int a, std::int64_t offset) const {
    return {entry.arrays[a], entry.formats.array[a], offset};
  }
  GF_DEVICE MixedArray gradients(const void* start, std::int64_t offset) const {
    return {const_cast<void*>(start), entry.formats.array[kGradient], offset};
  }
};

// One element; `at(a)` says where it lies in array number `a`, `number` is its own, in the tensor.
template <class Rule, class Constants, class Position>
GF_DEVICE void update_one(const Constants& constants, const MixedTensor<Rule>& tensor, const MixedArray& gradients,
                          std::int64_t number, Position at) {
  constexpr int kCopy = MixedTensor<Rule>::kArrays;
  float state[kMaxStates] = {};
  for (int s = 0; s < Rule::kStates; ++s) state[s] = load_one(tensor.array(kFirstState + s, 0), at(kFirstState + s));
  float p = load_one(tensor.array(kParameter, 0), at(kParameter));
  Rule::apply(constants, p, clamp(load_one(gradients, at(kGradient)), constants.clip.limit), state);
  std::uint32_t random[2] = {};
  for (int pair = 0; pair < 2; ++pair) {
    if (tensor.draws[pair]) random[pair] = random_word(tensor.key, number, pair);
  }
  const auto store = [&](int a, float value) {
    const RandomPlace place(a);
    store_one(tensor.array(a, 0), at(a), value, (random[place.pair] >> place.shift) & 0xffffu);
  };
  store(kParameter, p);
  for (int s = 0; s < Rule::kStates; ++s) store(kFirstState + s, state[s]);
  if (tensor.entry.formats.has_copy) store_one(tensor.array(kCopy, 0), at(kCopy), p, 0);
}

// Whole quads of a dense chunk, of which the first element has number `offset`.
template <class Rule, class Constants>
GF_DEVICE void update_quads(const Constants& constants, const MixedTensor<Rule>& tensor, const MixedArray& g,
                            std::int64_t offset, int quads, int lane) {
  const MixedArray parameter = tensor.array(kParameter, offset);
  const bool g_aligned = g.is_aligned(), p_aligned = parameter.is_aligned();
  GF_NO_UNROLL
  for (int quad = lane; quad < quads; quad += kWarpSize) {
    const int element = quad * kQuad;
    Bits128 stored_state[kMaxStates];
    const Bits128 stored_p = load_quad(parameter, element, p_aligned, true);
    const Bits128 stored_g = load_quad(g, element, g_aligned, false);  // perhaps in shared memory
    for (int s = 0; s < Rule::kStates; ++s) {
      const MixedArray array = tensor.array(kFirstState + s, offset);
      stored_state[s] = load_quad(array, element, array.is_aligned(), true);
    }
    RandomWords random[2] = {};
    for (int pair = 0; pair < 2; ++pair) {
      if (tensor.draws[pair]) random[pair] = random_words(tensor.key, (offset + element) / kQuad, pair);
    }
    Quad p = widen_quad(parameter.format, stored_p);
    const Quad gradient = widen_quad(g.format, stored_g);
    Quad states[kMaxStates];
    for (int s = 0; s < Rule::kStates; ++s) {
      states[s] = widen_quad(tensor.entry.formats.array[kFirstState + s], stored_state[s]);
    }
    GF_UNROLL
    for (int e = 0; e < kQuad; ++e) {
      float state[kMaxStates];
      for (int s = 0; s < Rule::kStates; ++s) state[s] = states[s].value[e];
      Rule::apply(constants, p.value[e], clamp(gradient.value[e], constants.clip.limit), state);
      for (int s = 0; s < Rule::kStates; ++s) states[s].value[e] = state[s];
    }
    const auto store = [&](const MixedArray& array, const Quad& values, int a) {
      const RandomPlace place(a);
      store_quad(array, element, array.is_aligned(),
                 narrow_quad(array.format, values, random[place.pair], place.shift));
    };
    store(parameter, p, kParameter);
    for (int s = 0; s < Rule::kStates; ++s) store(tensor.array(kFirstState + s, offset), states[s], kFirstState + s);
    if (tensor.entry.formats.has_copy) store(tensor.array(MixedTensor<Rule>::kArrays, offset), p, kParameter);
  }
}

// Phase 2 of this block, a warp a chunk, last first. `kept(chunk, g)` as in update().
template <class Rule, class Kept>
GF_DEVICE void update_mixed_dense(const Header& header, Changing changing, Share share, double scale,
                                  unsigned char* constants_of_warp, Kept kept) {
  Prepared prepared;
  GF_NO_UNROLL
  for (int c = share.last - 1 - warp_index(); c >= share.first; c -= kWarps) {
    const ChunkEntry chunk = header.chunks[c];
    const TensorEntry& entry = header.tensors[chunk.tensor];
    if (!is_dense(entry)) continue;
    const auto& constants = prepare<Rule, Mixed>(prepared, header, changing, chunk.tensor, scale, constants_of_warp);
    const MixedTensor<Rule> tensor(header, entry);
    MixedArray g = tensor.gradients(changing.gradients[chunk.tensor], chunk.offset);
    if (unsigned char* copy = kept(chunk, static_cast<const unsigned char*>(g.first))) g.first = copy;
    const int quads = chunk.length / kQuad, lane = lane_index();
    update_quads(constants, tensor, g, chunk.offset, quads, lane);
    const int rest = quads * kQuad + lane;
    if (rest < chunk.length) {
      const std::int64_t number = chunk.offset + rest;
      update_one(constants, tensor, g, number, [&](int array) { return array == kGradient ? rest : number; });
    }
  }
}

template <class Rule>
GF_DEVICE void update_mixed_strided(const Header& header, Changing changing, Share share, double scale,
                                    unsigned char* constants_of_warp) {
  Prepared prepared;
  GF_NO_UNROLL
  for (int c = share.last - 1 - warp_index(); c >= share.first; c -= kWarps) {
    const ChunkEntry chunk = header.chunks[c];
    const TensorEntry& entry = header.tensors[chunk.tensor];
    if (!is_strided(entry)) continue;
    const auto& constants = prepare<Rule, Mixed>(prepared, header, changing, chunk.tensor, scale, constants_of_warp);
    const MixedTensor<Rule> tensor(header, entry);
    const MixedArray g = tensor.gradients(changing.gradients[chunk.tensor], 0);
    const Layout& layout = header.layouts[entry.layout];
    GF_NO_UNROLL
    for (int i = lane_index(); i < chunk.length; i += kWarpSize) {
      const std::int64_t number = chunk.offset + i;
      update_one(constants, tensor, g, number, [&](int array) { return layout.offset(number, array); });
    }
  }
}

}  // namespace gradfast::cuda

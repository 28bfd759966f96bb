// Phase 1: the sum of powers of one chunk, by one warp. Reads 4 bytes a parameter in fp32: every gradient once.
//
// Sums are doubles, as rules/norm.h asks. Adding each element as a double costs nothing where the GPU has fp64 units
// enough, but the consumer ones have two a multiprocessor. So 16-bit gradients, whose squares a float holds exactly,
// are first added up by fours in fp32 (relative error under 2^-23 of four elements, random in sign).
#pragma once

#include "access.cuh"
#include "rules/clip.h"
#include "rules/norm.h"

namespace gradfast::cuda {

// The norm's power, and what every element is clamped to: infinity where it is not.
template <class A>
struct Measured {
  double p;
  A limit;
};

template <class A>
GF_DEVICE Measured<A> measured(const Header& header) {
  return {header.norm.p, static_cast<A>(element_limit(header.clip, header.loss_scale))};
}

template <class Kind, class Storage, class A>
GF_DEVICE double add_element(double sum, Storage g, Measured<A> how) {
  return Kind::add(sum, static_cast<double>(clamp<A>(widen(g), how.limit)), how.p);
}

template <class Kind, class Storage, class A>
GF_DEVICE double add_vector(double sum, const Vector<Storage>& g, Measured<A> how) {
  GF_UNROLL
  for (int e = 0; e < kVector<Storage>; ++e) sum = add_element<Kind>(sum, g.element[e], how);
  return sum;
}

template <class Storage>
GF_DEVICE double add_squares_of_four(double sum, const Storage* g, float limit) {
  const float a = clamp(widen(g[0]), limit), b = clamp(widen(g[1]), limit);
  const float c = clamp(widen(g[2]), limit), d = clamp(widen(g[3]), limit);
  const float squares = (a * a + b * b) + (c * c + d * d);
  // Far inside the range of a float nothing of weight was lost. Outside of it, and for NaN, one by one in fp64.
  if (squares > 0x1p-90f && squares < 0x1p120f) return sum + static_cast<double>(squares);
  const double four[4] = {a, b, c, d};
  GF_UNROLL
  for (int e = 0; e < 4; ++e) sum = NormTwo::add(sum, four[e], 2.0);
  return sum;
}

template <>
GF_DEVICE double add_vector<NormTwo>(double sum, const Vector<Half>& g, Measured<float> how) {
  return add_squares_of_four(add_squares_of_four(sum, g.element, how.limit), g.element + 4, how.limit);
}

template <>
GF_DEVICE double add_vector<NormTwo>(double sum, const Vector<BFloat16>& g, Measured<float> how) {
  return add_squares_of_four(add_squares_of_four(sum, g.element, how.limit), g.element + 4, how.limit);
}

// This lane's part of the sum over `length` dense gradients. Copies them to `kept` unless that is null; `kept` has the
// same distance from a 16-byte boundary as `g`.
template <class Kind, class Storage>
GF_DEVICE double measure_dense(const Storage* g, Storage* kept, int length, int lane,
                               Measured<Arithmetic<Storage>> how) {
  constexpr int kBatch = 4;  // loads in flight
  const Span<Storage> span(g, length);
  constexpr int kStride = kWarpSize * kVector<Storage>;
  double sum = 0;
  GF_NO_UNROLL
  for (int first = lane; first < span.vectors; first += kBatch * kWarpSize) {
    const Storage* from = g + span.head + first * kVector<Storage>;
    Bits128 batch[kBatch];
    GF_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kWarpSize < span.vectors) batch[b] = load_bits(from + b * kStride);
    }
    GF_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kWarpSize < span.vectors) sum = add_vector<Kind>(sum, vector_of<Storage>(batch[b]), how);
    }
    if (!kept) continue;
    Storage* to = kept + span.head + first * kVector<Storage>;
    GF_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kWarpSize < span.vectors) store_bits(to + b * kStride, batch[b]);
    }
  }
  const int single = span.single(lane);
  if (single >= 0) {
    sum = add_element<Kind>(sum, g[single], how);
    if (kept) kept[single] = g[single];
  }
  return sum;
}

// Joins the lanes' values; every lane returns the same.
template <class Kind>
GF_DEVICE double warp_join(double value) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = Kind::join(value, shuffle_xor(value, mask));
  return value;
}

GF_DEVICE UnitSums warp_join(UnitSums sums) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    sums = join(sums, {shuffle_xor(sums.gradients, mask), shuffle_xor(sums.weights, mask)});
  }
  return sums;
}

// The same for gradients that do not lie densely, one at a time.
template <class Kind, class Storage>
GF_DEVICE double measure_strided(const Storage* g, const Layout& layout, std::int64_t first, int length, int lane,
                                 Measured<Arithmetic<Storage>> how) {
  double sum = 0;
  GF_NO_UNROLL
  for (int i = lane; i < length; i += kWarpSize) {
    sum = add_element<Kind>(sum, g[layout.offset(first + i, kGradient)], how);
  }
  return sum;
}

// The sum of powers of a dense chunk, by one warp.
template <class Kind, class Storage, class Kept>
GF_DEVICE void measure_chunk(const Header& header, Changing changing, int c, Kept kept) {
  const ChunkEntry chunk = header.chunks[c];
  const TensorEntry& tensor = header.tensors[chunk.tensor];
  const double part = with_gradients<Storage>(tensor, changing.gradients[chunk.tensor], [&](const auto* gradients) {
    const auto* g = gradients + chunk.offset;
    return measure_dense<Kind>(g, kept(chunk, g), chunk.length, lane_index(), measured<decltype(widen(*g))>(header));
  });
  const double sum = warp_join<Kind>(part);
  if (lane_index() == 0) header.partials[c] = sum;
}

// And of one whose gradients do not lie densely.
template <class Kind, class Storage>
GF_DEVICE void measure_strided_chunk(const Header& header, Changing changing, int c) {
  const ChunkEntry chunk = header.chunks[c];
  const TensorEntry& tensor = header.tensors[chunk.tensor];
  const Layout& layout = header.layouts[tensor.layout];
  const double part = with_gradients<Storage>(tensor, changing.gradients[chunk.tensor], [&](const auto* g) {
    return measure_strided<Kind>(g, layout, chunk.offset, chunk.length, lane_index(),
                                 measured<decltype(widen(*g))>(header));
  });
  const double sum = warp_join<Kind>(part);
  if (lane_index() == 0) header.partials[c] = sum;
}

// The dense chunks among those of this block, a warp each.
template <class Kind, class Storage, class Kept>
GF_DEVICE void measure_chunks(const Header& header, Changing changing, Share share, Kept kept) {
  GF_NO_UNROLL
  for (int c = share.first + warp_index(); c < share.last; c += kWarps) {
    if (!is_dense(header.tensors[header.chunks[c].tensor])) continue;
    measure_chunk<Kind, Storage>(header, changing, c, kept);
  }
}

// Those that a Layout finds.
template <class Kind, class Storage>
GF_DEVICE void measure_strided_chunks(const Header& header, Changing changing, Share share) {
  GF_NO_UNROLL
  for (int c = share.first + warp_index(); c < share.last; c += kWarps) {
    if (!is_strided(header.tensors[header.chunks[c].tensor])) continue;
    measure_strided_chunk<Kind, Storage>(header, changing, c);
  }
}

}  // namespace gradfast::cuda

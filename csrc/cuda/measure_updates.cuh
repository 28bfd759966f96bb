// Phase 1 with update clipping: beside a chunk's sum of powers, that of its squared updates. The gradients have just
// been read, and lie in shared memory or a cache; v comes from memory, 4 bytes a parameter in fp32, 36 in all, and may
// still lie in L2 in phase 2. Where the updates depend on the norm, the same is done between decision and update, after
// another barrier of the grid: 40 bytes, less what is kept or cached of gradients and v. No ratio of squares exceeds 1
// / (1 - beta2), so those of a vector are added up in the type that they were computed in (fp32: relative error under
// 2^-21), and only then as doubles.
#pragma once

#include "measure.cuh"
#include "mixed.cuh"

namespace gradfast::cuda {

inline constexpr int kSecondMoments = kFirstState + 1;

template <class Rule, class A>
GF_DEVICE A square_one(const typename Rule::template Constants<A>& constants, A g, A v) {
  return Rule::squared_update(constants, clamp(g, constants.clip.limit), v);
}

// This lane's part of the sum over dense arrays.
template <class Rule, class Storage>
GF_DEVICE double square_dense(const ConstantsOf<Rule, Storage>& constants, const Storage* g, const Storage* v,
                              int length, int lane) {
  using A = Arithmetic<Storage>;
  constexpr int kBatch = sizeof(Storage) == 4 ? 4 : 2;  // loads of either array in flight; four of others would spill
  constexpr int kStride = kWarpSize * kVector<Storage>;
  const Span<Storage> span(g, length);
  const bool v_aligned = is_aligned(v + span.head);
  double sum = 0;
  GF_NO_UNROLL
  for (int first = lane; first < span.vectors; first += kBatch * kWarpSize) {
    const int at = span.head + first * kVector<Storage>;
    Vector<Storage> gs[kBatch], vs[kBatch];
    GF_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kWarpSize >= span.vectors) continue;
      const Storage* from = v + at + b * kStride;
      gs[b] = vector_of<Storage>(load_bits(g + at + b * kStride));
      vs[b] = v_aligned ? vector_of<Storage>(load_bits(from)) : load_elements(from);
    }
    GF_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kWarpSize >= span.vectors) continue;
      A squares = 0;
      GF_UNROLL
      for (int e = 0; e < kVector<Storage>; ++e) {
        squares += square_one<Rule, A>(constants, widen(gs[b].element[e]), widen(vs[b].element[e]));
      }
      sum += static_cast<double>(squares);
    }
  }
  const int single = span.single(lane);
  if (single >= 0) sum += square_one<Rule>(constants, load_one(g, single), load_one(v, single));
  return sum;
}

template <class Rule, class Storage>
GF_DEVICE double square_dense(const ConstantsOf<Rule, Storage>& constants, const MixedArray& g, const MixedArray& v,
                              int length, int lane) {
  const bool g_aligned = g.is_aligned(), v_aligned = v.is_aligned();
  const int quads = length / kQuad;
  double sum = 0;
  GF_NO_UNROLL
  for (int quad = lane; quad < quads; quad += kWarpSize) {
    const Bits128 stored_g = load_quad(g, quad * kQuad, g_aligned, false);
    const Bits128 stored_v = load_quad(v, quad * kQuad, v_aligned, false);
    const Quad gs = widen_quad(g.format, stored_g), vs = widen_quad(v.format, stored_v);
    float squares = 0;
    GF_UNROLL
    for (int e = 0; e < kQuad; ++e) squares += square_one<Rule>(constants, gs.value[e], vs.value[e]);
    sum += static_cast<double>(squares);
  }
  const int rest = quads * kQuad + lane;
  if (rest < length) sum += square_one<Rule>(constants, load_one(g, rest), load_one(v, rest));
  return sum;
}

// This lane's part of the sum over one chunk.
template <class Rule, class Storage, class Kept>
GF_DEVICE double square_chunk(const ConstantsOf<Rule, Storage>& constants, const Header& header,
                              const ChunkEntry& chunk, const void* gradients, Kept kept) {
  const TensorEntry& tensor = header.tensors[chunk.tensor];
  const bool dense = tensor.layout < 0;
  const std::int64_t offset = dense ? chunk.offset : 0;
  auto g = array_from<Storage>(gradients, tensor.formats.array[kGradient], offset);
  const auto v = array_from<Storage>(tensor.arrays[kSecondMoments], tensor.formats.array[kSecondMoments], offset);
  if (dense) {
    if constexpr (std::is_same_v<Storage, Mixed>) {
      if (unsigned char* copy = kept(chunk, static_cast<const unsigned char*>(g.first))) g.first = copy;
    } else {
      if (const Storage* copy = kept(chunk, g)) g = copy;
    }
    return square_dense<Rule, Storage>(constants, g, v, chunk.length, lane_index());
  }
  const Layout& layout = header.layouts[tensor.layout];
  double sum = 0;
  GF_NO_UNROLL
  for (int i = lane_index(); i < chunk.length; i += kWarpSize) {
    const std::int64_t element = chunk.offset + i;
    sum += square_one<Rule>(constants, load_one(g, layout.offset(element, kGradient)),
                            load_one(v, layout.offset(element, kSecondMoments)));
  }
  return sum;
}

// The constants with the tensor's clip factor. In phase 1 nothing clips yet: there the loss scale is all that is taken
// out of the gradients.
template <class Rule, class Storage, bool kApart>
GF_DEVICE_CALL void make_measuring_constants(const Header& header, const GroupEntry& group, int index, float updates,
                                             unsigned char* result) {
  const double scale = kApart ? header.tensor_scales[index] : 1.0 / loss_scale_of(header);
  make_constants<Rule, Storage>(header, group, updates, scale, 1.0, result);
}

template <class Rule, class Storage, bool kApart>
GF_DEVICE const ConstantsOf<Rule, Storage>& prepare_measuring(Prepared& prepared, const Header& header,
                                                              Changing changing, int index,
                                                              unsigned char* constants_of_warp) {
  const TensorEntry& tensor = header.tensors[index];
  const Prepared wanted{kApart ? index : tensor.group, updates_of(tensor)};
  return refresh<Rule, Storage>(prepared, wanted, constants_of_warp, [&] {
    make_measuring_constants<Rule, Storage, kApart>(header, changing.groups[tensor.group], index, wanted.updates,
                                                    constants_of_warp);
  });
}

// The squares of this block's updates, for the rules that know an update's size: apart, or in phase 1, and there its
// powers as well, where the launch has that task too.
template <class Rule, class Storage, bool kApart, class Kept>
GF_DEVICE_CALL void measure_updates(const Header& header, Changing changing, BlockMemory& memory, Share share,
                                    Kept kept) {
  unsigned char* constants_of_warp = memory.constants[warp_index()];
  Prepared prepared;
  GF_NO_UNROLL
  for (int c = share.first + warp_index(); c < share.last; c += kWarps) {
    const ChunkEntry chunk = header.chunks[c];
    if (!kApart && (header.tasks & kMeasure)) {
      if (header.tensors[chunk.tensor].layout < 0) {
        measure_chunk<NormTwo, Storage>(header, changing, c, kept);
      } else {
        measure_strided_chunk<NormTwo, Storage>(header, changing, c);
      }
      warp_barrier();  // what one lane kept, another may read
    }
    const auto& constants =
        prepare_measuring<Rule, Storage, kApart>(prepared, header, changing, chunk.tensor, constants_of_warp);
    const double part = square_chunk<Rule, Storage>(constants, header, chunk, changing.gradients[chunk.tensor], kept);
    const double sum = warp_join<NormTwo>(part);
    if (lane_index() == 0) header.update_partials[c] = sum * Rule::squared_update_factor(constants);
  }
}

}  // namespace gradfast::cuda

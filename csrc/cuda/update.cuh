// Phase 2: the rule applied to one chunk, by one warp. SGD with momentum in fp32 moves 20 bytes a parameter: p and m
// read and written, g read; 16 where g was kept in shared memory, and the L2 cache may still hold some of the rest.
#pragma once

#include <new>

#include "access.cuh"
#include "rules/rules.h"

namespace gradfast::cuda {

// What a rule's constants were made from. The next chunk mostly needs the same.
struct Prepared {
  std::int32_t shared_by = -1;  // group; or tensor, where each has a factor of its own
  float updates = 0;
};

template <class Rule, class Storage>
using ConstantsOf = typename Rule::template Constants<Arithmetic<Storage>>;

// The rule's constants for a tensor that had `updates` updates before this one, by one lane.
template <class Rule, class Storage>
GF_DEVICE void make_constants(const Header& header, const GroupEntry& group, float updates, double scale, double rate,
                              unsigned char* result) {
  PackedHyperparameters values = group.values;
  if (group.lr) {
    values.value[0] = group.lr_is_double ? *static_cast<const double*>(group.lr)
                                         : static_cast<double>(*static_cast<const float*>(group.lr));
  }
  values.value[0] *= rate;
  const ElementClip<double> clip{element_limit(header.clip, header.loss_scale), scale};
  static_assert(sizeof(ConstantsOf<Rule, Storage>) <= kMaxConstantsBytes, "raise kMaxConstantsBytes");
  new (result) ConstantsOf<Rule, Storage>(
      Rule::template prepare<Arithmetic<Storage>>(unpack<Rule>(values), updates + 1.0, clip));
}

// Those of the update, with the factors that the tensor at `index` may have of its own.
template <class Rule, class Storage>
GF_DEVICE_CALL void make_constants(const Header& header, const GroupEntry& group, int index, float updates,
                                   double scale, unsigned char* result) {
  if (header.each_tensor) scale = header.tensor_scales[index];
  double rate = 1;
  if constexpr (ClipsUpdates<Rule>) {
    if (header.tensor_rates) rate = header.tensor_rates[index];
  }
  make_constants<Rule, Storage>(header, group, updates, scale, rate, result);
}

GF_DEVICE float updates_of(const TensorEntry& tensor) { return tensor.step ? *tensor.step : 0.0f; }

// Has the first lane make() the constants anew unless they are the wanted ones. They are handed from lane to lane in
// shared memory, `constants_of_warp`.
template <class Rule, class Storage, class Make>
GF_DEVICE const ConstantsOf<Rule, Storage>& refresh(Prepared& prepared, Prepared wanted,
                                                    unsigned char* constants_of_warp, Make make) {
  if (prepared.shared_by != wanted.shared_by || prepared.updates != wanted.updates) {
    prepared = wanted;
    warp_barrier();  // nobody reads the old ones any more
    if (lane_index() == 0) make();
    warp_barrier();
  }
  return *reinterpret_cast<const ConstantsOf<Rule, Storage>*>(constants_of_warp);
}

// The constants for the tensor at `index`.
template <class Rule, class Storage>
GF_DEVICE const ConstantsOf<Rule, Storage>& prepare(Prepared& prepared, const Header& header, Changing changing,
                                                    int index, double scale, unsigned char* constants_of_warp) {
  const TensorEntry& tensor = header.tensors[index];
  const Prepared wanted{header.each_tensor ? index : tensor.group, updates_of(tensor)};
  return refresh<Rule, Storage>(prepared, wanted, constants_of_warp, [&] {
    make_constants<Rule, Storage>(header, changing.groups[tensor.group], index, wanted.updates, scale,
                                  constants_of_warp);
  });
}

// Two blocks share a multiprocessor, so that a thread may have 128 registers and spills none of them, and it loads this
// many vectors of each array before it uses the first. What counts is their product, the bytes under way: a
// multiprocessor of an H100 needs about 25 KB, and two blocks of SGD with momentum have 48.
inline constexpr int kResidentBlocks = 2;
constexpr int vectors_in_flight(int states, std::size_t element_bytes) {
  if (states == 0) return 4;
  return states == 3 && element_bytes != 4 ? 1 : 2;
}
template <class Rule, class Storage>
inline constexpr int kVectorsInFlight = vectors_in_flight(Rule::kStates, sizeof(Storage));

// The arrays of one chunk, each from the chunk's first element on.
template <class Rule, class Storage>
struct ChunkArrays {
  Storage* parameter;
  const Storage* gradient;
  Storage* state[kMaxStates];

  GF_DEVICE ChunkArrays(const TensorEntry& tensor, const void* gradients, std::int64_t offset) {
    parameter = static_cast<Storage*>(tensor.arrays[kParameter]) + offset;
    gradient = static_cast<const Storage*>(gradients) + offset;
    for (int s = 0; s < Rule::kStates; ++s) {
      state[s] = static_cast<Storage*>(tensor.arrays[kFirstState + s]) + offset;
    }
  }
};

// One element; `at` says where it lies in array number `a`.
template <class Rule, class Storage, class Constants, class Position>
GF_DEVICE void update_element(const Constants& constants, const ChunkArrays<Rule, Storage>& arrays, Position at) {
  using A = Arithmetic<Storage>;
  A state[kMaxStates];
  for (int s = 0; s < Rule::kStates; ++s) state[s] = widen(arrays.state[s][at(kFirstState + s)]);
  A p = widen(arrays.parameter[at(kParameter)]);
  Rule::apply(constants, p, clamp<A>(widen(arrays.gradient[at(kGradient)]), constants.clip.limit), state);
  arrays.parameter[at(kParameter)] = narrow<Storage>(p);
  for (int s = 0; s < Rule::kStates; ++s) arrays.state[s][at(kFirstState + s)] = narrow<Storage>(state[s]);
}

template <class Rule, class Storage, class Constants>
GF_DEVICE void update_vector(const Constants& constants, Vector<Storage>& p, const Vector<Storage>& g,
                             Vector<Storage>* states) {
  using A = Arithmetic<Storage>;
  GF_UNROLL
  for (int e = 0; e < kVector<Storage>; ++e) {
    A state[kMaxStates];
    for (int s = 0; s < Rule::kStates; ++s) state[s] = widen(states[s].element[e]);
    A parameter = widen(p.element[e]);
    Rule::apply(constants, parameter, clamp<A>(widen(g.element[e]), constants.clip.limit), state);
    p.element[e] = narrow<Storage>(parameter);
    for (int s = 0; s < Rule::kStates; ++s) states[s].element[e] = narrow<Storage>(state[s]);
  }
}

// Whole vectors. The parameter's are aligned to 16 bytes; another array's need not be, and is then read and written
// by single elements, which changes nothing for the rest.
template <class Storage>
GF_DEVICE Vector<Storage> load_elements(const Storage* from) {
  Vector<Storage> vector;
  GF_UNROLL
  for (int e = 0; e < kVector<Storage>; ++e) vector.element[e] = from[e];
  return vector;
}

template <class Storage>
GF_DEVICE void store_elements(Storage* to, const Vector<Storage>& vector) {
  GF_UNROLL
  for (int e = 0; e < kVector<Storage>; ++e) to[e] = vector.element[e];
}

template <class Rule, class Storage, class Constants>
GF_DEVICE void update_vectors(const Constants& constants, const ChunkArrays<Rule, Storage>& arrays,
                              const Span<Storage>& span, int lane) {
  constexpr int kBatch = kVectorsInFlight<Rule, Storage>;
  constexpr int kStride = kWarpSize * kVector<Storage>;
  const bool gradient_aligned = is_aligned(arrays.gradient + span.head);
  bool state_aligned[kMaxStates];
  for (int s = 0; s < Rule::kStates; ++s) state_aligned[s] = is_aligned(arrays.state[s] + span.head);

  GF_NO_UNROLL
  for (int first = lane; first < span.vectors; first += kBatch * kWarpSize) {
    const int at = span.head + first * kVector<Storage>;
    Vector<Storage> p[kBatch], g[kBatch], state[kBatch][kMaxStates];
    GF_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kWarpSize >= span.vectors) continue;
      p[b] = vector_of<Storage>(load_bits_streaming(arrays.parameter + at + b * kStride));
      const Storage* gradient = arrays.gradient + at + b * kStride;  // perhaps in shared memory
      g[b] = gradient_aligned ? vector_of<Storage>(load_bits(gradient)) : load_elements(gradient);
      for (int s = 0; s < Rule::kStates; ++s) {
        const Storage* from = arrays.state[s] + at + b * kStride;
        state[b][s] = state_aligned[s] ? vector_of<Storage>(load_bits_streaming(from)) : load_elements(from);
      }
    }
    GF_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kWarpSize >= span.vectors) continue;
      update_vector<Rule>(constants, p[b], g[b], state[b]);
      store_bits_streaming(arrays.parameter + at + b * kStride, bits_of_vector(p[b]));
      for (int s = 0; s < Rule::kStates; ++s) {
        Storage* to = arrays.state[s] + at + b * kStride;
        if (state_aligned[s]) {
          store_bits_streaming(to, bits_of_vector(state[b][s]));
        } else {
          store_elements(to, state[b][s]);
        }
      }
    }
  }
}

template <class Rule, class Storage, class Constants>
GF_DEVICE void update_dense(const Constants& constants, const ChunkArrays<Rule, Storage>& arrays, int length,
                            int lane) {
  const Span<Storage> span(arrays.parameter, length);
  update_vectors(constants, arrays, span, lane);
  const int single = span.single(lane);
  if (single >= 0) update_element(constants, arrays, [single](int) { return single; });
}

// The arrays of a tensor whose arrays do not share one dense layout, element by element.
template <class Rule, class Storage, class Constants>
GF_DEVICE void update_strided(const Constants& constants, const ChunkArrays<Rule, Storage>& arrays,
                              const Layout& layout, std::int64_t first, int length, int lane) {
  GF_NO_UNROLL
  for (int i = lane; i < length; i += kWarpSize) {
    update_element(constants, arrays, [&layout, index = first + i](int array) { return layout.offset(index, array); });
  }
}

// Updates the dense chunks among those of this block, a warp each, last first.
template <class Rule, class Storage, class Kept>
GF_DEVICE void update_chunks(const Header& header, Changing changing, Share share, double scale,
                             unsigned char* constants_of_warp, Kept kept) {
  Prepared prepared;
  GF_NO_UNROLL
  for (int c = share.last - 1 - warp_index(); c >= share.first; c -= kWarps) {
    const ChunkEntry chunk = header.chunks[c];
    const TensorEntry& tensor = header.tensors[chunk.tensor];
    if (!is_dense(tensor)) continue;
    const auto& constants = prepare<Rule, Storage>(prepared, header, changing, chunk.tensor, scale, constants_of_warp);
    ChunkArrays<Rule, Storage> arrays(tensor, changing.gradients[chunk.tensor], chunk.offset);
    if (const Storage* copy = kept(chunk, arrays.gradient)) arrays.gradient = copy;
    update_dense(constants, arrays, chunk.length, lane_index());
  }
}

// Those that a Layout finds.
template <class Rule, class Storage>
GF_DEVICE void update_strided_chunks(const Header& header, Changing changing, Share share, double scale,
                                     unsigned char* constants_of_warp) {
  Prepared prepared;
  GF_NO_UNROLL
  for (int c = share.last - 1 - warp_index(); c >= share.first; c -= kWarps) {
    const ChunkEntry chunk = header.chunks[c];
    const TensorEntry& tensor = header.tensors[chunk.tensor];
    if (!is_strided(tensor)) continue;
    const auto& constants = prepare<Rule, Storage>(prepared, header, changing, chunk.tensor, scale, constants_of_warp);
    const ChunkArrays<Rule, Storage> arrays(tensor, changing.gradients[chunk.tensor], 0);
    update_strided(constants, arrays, header.layouts[tensor.layout], chunk.offset, chunk.length, lane_index());
  }
}

}  // namespace gradfast::cuda

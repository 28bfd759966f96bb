#include "cpu/kernels.h"

#include <algorithm>
#include <new>
#include <type_traits>

#include "cpu/convert.h"
#include "cpu/instruction_set.h"

namespace gradfast::cpu {
namespace {

template <class Rule, class T>
using ConstantsOf = typename Rule::template Constants<Arithmetic<T>>;

// A gradient as it is read. The loops are compiled for both: in the cache clamping takes up to half as long again.
template <bool kClamps, class T>
GF_HOST_DEVICE Arithmetic<T> read(T gradient, Arithmetic<T> limit) {
  if constexpr (kClamps) return clamp<Arithmetic<T>>(widen(gradient), limit);
  return widen(gradient);
}

// Phase one reads each gradient once: 4 bytes an fp32 parameter. A core that reads in one place waits for memory;
// reading in four places at a time keeps more requests under way (1.1 to 1.3 times faster on an EPYC). The running sums
// of each are whole vectors, joined in a fixed order at the end.
template <class NormRule, bool kClamps, class T>
GF_HOST_DEVICE double measure_loop(const T* __restrict gradients, std::int64_t length, double p, Arithmetic<T> limit) {
  constexpr int kStreams = 4, kLanes = sizeof(T) == 2 ? 16 : 8, kSums = kStreams * kLanes;
  const std::int64_t part = length / kSums * kLanes;  // of each stream
  double total = 0;
  if (part > 0) {
    double sums[kSums] = {};
    for (std::int64_t i = 0; i < part; i += kLanes) {
      for (int stream = 0; stream < kStreams; ++stream) {
        if constexpr (!kClamps && std::is_same_v<T, float>) {
          for (int lane = 0; lane < kLanes; ++lane) {
            double& sum = sums[stream * kLanes + lane];
            sum = NormRule::add(sum, widen(gradients[stream * part + i + lane]), p);
          }
        } else {  // in two loops GCC makes vector code of the others: fp64 is five times as fast in the cache
          Arithmetic<T> g[kLanes];
          for (int lane = 0; lane < kLanes; ++lane) g[lane] = read<kClamps>(gradients[stream * part + i + lane], limit);
          double* sum = sums + stream * kLanes;
          for (int lane = 0; lane < kLanes; ++lane) sum[lane] = NormRule::add(sum[lane], g[lane], p);
        }
      }
    }
    for (int half = kSums / 2; half > 0; half /= 2) {
      for (int sum = 0; sum < half; ++sum) sums[sum] = NormRule::join(sums[sum], sums[sum + half]);
    }
    total = sums[0];
  }
  for (std::int64_t i = kStreams * part; i < length; ++i) {
    total = NormRule::add(total, read<kClamps>(gradients[i], limit), p);
  }
  return total;
}

// Phase two reads p, g and the states and writes p and the states, each once: 20 bytes an fp32 parameter for SGD with
// momentum, 28 for Adam. With phase one that is 24 and 32: the floor when gradients don't stay in the cache.
template <class Rule, bool kClamps, class T>
GF_HOST_DEVICE void update_loop(const ConstantsOf<Rule, T>& constants, const Span& span) {
  using A = Arithmetic<T>;
  const auto k = constants;
  T* p = static_cast<T*>(span.arrays[kParameter]);
  const T* g = static_cast<const T*>(span.arrays[kGradient]);
  T* s0 = static_cast<T*>(span.arrays[kFirstState]);
  T* s1 = static_cast<T*>(span.arrays[kFirstState + 1]);
  T* s2 = static_cast<T*>(span.arrays[kFirstState + 2]);
  const std::int64_t length = span.length;
#pragma GCC ivdep
  for (std::int64_t i = 0; i < length; ++i) {
    A parameter = widen(p[i]);
    A state[kMaxStates];
    if constexpr (Rule::kStates > 0) state[0] = widen(s0[i]);
    if constexpr (Rule::kStates > 1) state[1] = widen(s1[i]);
    if constexpr (Rule::kStates > 2) state[2] = widen(s2[i]);
    Rule::apply(k, parameter, read<kClamps>(g[i], k.clip.limit), state);
    p[i] = narrow<T>(parameter);
    if constexpr (Rule::kStates > 0) s0[i] = narrow<T>(state[0]);
    if constexpr (Rule::kStates > 1) s1[i] = narrow<T>(state[1]);
    if constexpr (Rule::kStates > 2) s2[i] = narrow<T>(state[2]);
  }
}

// The update's size, for update clipping: reads g, which phase one has just brought into the cache, and v: 4 bytes more
// a parameter in fp32, 36 in all.
template <class Rule, bool kClamps, class T>
GF_HOST_DEVICE double squares_loop(const ConstantsOf<Rule, T>& constants, const Span& span) {
  constexpr int kLanes = 16;
  const auto k = constants;
  const T* g = static_cast<const T*>(span.arrays[kGradient]);
  const T* v = static_cast<const T*>(span.arrays[kFirstState + 1]);
  double sums[kLanes] = {}, total = 0;
  const std::int64_t whole = span.length / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane)
      sums[lane] += Rule::squared_update(k, read<kClamps>(g[i + lane], k.clip.limit), widen(v[i + lane]));
  }
  for (const double sum : sums) total += sum;
  for (std::int64_t i = whole; i < span.length; ++i) {
    total += Rule::squared_update(k, read<kClamps>(g[i], k.clip.limit), widen(v[i]));
  }
  return total * Rule::squared_update_factor(k);
}

template <class NormRule, class T>
struct MeasureLoop {
  static GF_HOST_DEVICE double run(const void* gradients, std::int64_t n, double p, double limit) {
    const T* g = static_cast<const T*>(gradients);
    if (limit == INFINITY) return measure_loop<NormRule, false>(g, n, p, INFINITY);
    return measure_loop<NormRule, true>(g, n, p, static_cast<Arithmetic<T>>(limit));
  }
  static double baseline(const void* g, std::int64_t n, double p, double limit) { return run(g, n, p, limit); }
  GF_TARGET_AVX2 static double avx2(const void* g, std::int64_t n, double p, double limit) {
    return run(g, n, p, limit);
  }
  GF_TARGET_AVX512 static double avx512(const void* g, std::int64_t n, double p, double limit) {
    return run(g, n, p, limit);
  }
};

// fp16 is widened by the processor's own instructions, which compilers do not find in a loop over single elements: a
// block at a time, in the first-level cache.
template <class NormRule>
double measure_half(const void* gradients, std::int64_t length, double p, double limit) {
  constexpr std::int64_t kBlock = 2048;
  static const auto measure = best_of<MeasureLoop<NormRule, float>>();
  const auto* stored = static_cast<const Half*>(gradients);
  alignas(64) float block[kBlock];
  double total = 0;
  for (std::int64_t done = 0; done < length; done += kBlock) {
    const std::int64_t count = std::min(kBlock, length - done);
    widen_block(Format::float16, stored + done, block, count);
    total = NormRule::join(total, measure(block, count, p, limit));
  }
  return total;
}

template <class Rule, class T>
struct UpdateLoop {
  static GF_HOST_DEVICE void run(const void* constants, const Span& span) {
    const auto& k = *static_cast<const ConstantsOf<Rule, T>*>(constants);
    if (k.clip.limit == INFINITY) return update_loop<Rule, false, T>(k, span);
    update_loop<Rule, true, T>(k, span);
  }
  static void baseline(const void* constants, const Span& span) { run(constants, span); }
  GF_TARGET_AVX2 static void avx2(const void* constants, const Span& span) { run(constants, span); }
  GF_TARGET_AVX512 static void avx512(const void* constants, const Span& span) { run(constants, span); }
};

template <class Rule, class T>
struct SquaresLoop {
  static GF_HOST_DEVICE double run(const void* constants, const Span& span) {
    const auto& k = *static_cast<const ConstantsOf<Rule, T>*>(constants);
    if (k.clip.limit == INFINITY) return squares_loop<Rule, false, T>(k, span);
    return squares_loop<Rule, true, T>(k, span);
  }
  static double baseline(const void* constants, const Span& span) { return run(constants, span); }
  GF_TARGET_AVX2 static double avx2(const void* constants, const Span& span) { return run(constants, span); }
  GF_TARGET_AVX512 static double avx512(const void* constants, const Span& span) { return run(constants, span); }
};

template <class Rule, class T>
void prepare(const PackedHyperparameters& values, double step, const ElementClip<double>& clip, void* constants) {
  using Constants = ConstantsOf<Rule, T>;
  static_assert(sizeof(Constants) <= kMaxConstantsBytes && std::is_trivially_destructible_v<Constants>);
  new (constants) Constants(Rule::template prepare<Arithmetic<T>>(unpack<Rule>(values), step, clip));
}

template <class Rule, class T>
void rescale(const void* constants, double factor, void* rescaled) {
  using Constants = ConstantsOf<Rule, T>;
  new (rescaled) Constants(gradfast::rescaled(*static_cast<const Constants*>(constants), factor));
}

// Calls `function` with a value of the storage type that `dtype` names.
template <class Function>
auto with_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::float64:
      return function(double{});
    case DType::float16:
      return function(Half{});
    case DType::bfloat16:
      return function(BFloat16{});
    default:
      return function(float{});
  }
}

template <class Rule>
UpdateFunctions functions_of(DType dtype) {
  return with_dtype(dtype, [](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, Half>) {
      return UpdateFunctions{};  // stepped in blocks of fp32
    } else {
      UpdateFunctions functions{&prepare<Rule, T>, &rescale<Rule, T>, best_of<UpdateLoop<Rule, T>>()};
      if constexpr (ClipsUpdates<Rule>) functions.square_updates = best_of<SquaresLoop<Rule, T>>();
      functions.arrays = kFirstState + Rule::kStates;
      return functions;
    }
  });
}

template <class... Rule>
UpdateFunctions find(RuleList<Rule...>, int rule, DType dtype) {
  using Finder = UpdateFunctions (*)(DType);
  static constexpr Finder finders[] = {&functions_of<Rule>...};
  return finders[rule](dtype);
}

}  // namespace

MeasureFunction measure_function(NormKind kind, DType dtype) {
  return with_norm(kind, [dtype](auto norm) {
    return with_dtype(dtype, [](auto element) -> MeasureFunction {
      if constexpr (std::is_same_v<decltype(element), Half>) {
        return &measure_half<decltype(norm)>;
      } else {
        return best_of<MeasureLoop<decltype(norm), decltype(element)>>();
      }
    });
  });
}

UpdateFunctions update_functions(int rule, DType dtype) { return find(Rules{}, rule, dtype); }

int size_of(DType dtype) {
  return with_dtype(dtype, [](auto element) { return static_cast<int>(sizeof element); });
}

}  // namespace gradfast::cpu

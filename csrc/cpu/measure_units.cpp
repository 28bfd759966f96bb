#include "cpu/measure_units.h"

#include "cpu/instruction_set.h"

namespace gradfast::cpu {
namespace {

template <class A>
GF_HOST_DEVICE double add_square(double sum, A value) {
  return NormTwo::add(sum, value, 2.0);
}

template <bool kClamps, class T>
GF_HOST_DEVICE Arithmetic<T> read(T gradient, Arithmetic<T> limit) {
  if constexpr (kClamps) return clamp<Arithmetic<T>>(widen(gradient), limit);
  return widen(gradient);
}

// Reads 8 bytes an fp32 parameter. Units may be short, so what is done once a unit counts: two vectors of running sums
// for either array, joined in a fixed order.
template <bool kClamps, class T>
GF_HOST_DEVICE UnitSums measure_unit(const T* __restrict gradients, const T* __restrict weights, std::int64_t length,
                                     Arithmetic<T> limit) {
  constexpr int kLanes = 16;
  const std::int64_t whole = length / kLanes * kLanes;
  UnitSums unit;
  if (whole > 0) {
    double of_gradients[kLanes] = {}, of_weights[kLanes] = {};
    for (std::int64_t i = 0; i < whole; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        of_gradients[lane] = add_square(of_gradients[lane], read<kClamps>(gradients[i + lane], limit));
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        of_weights[lane] = add_square(of_weights[lane], widen(weights[i + lane]));
      }
    }
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        of_gradients[lane] += of_gradients[lane + half];
        of_weights[lane] += of_weights[lane + half];
      }
    }
    unit = {of_gradients[0], of_weights[0]};
  }
  for (std::int64_t i = whole; i < length; ++i) {
    unit.gradients = add_square(unit.gradients, read<kClamps>(gradients[i], limit));
    unit.weights = add_square(unit.weights, widen(weights[i]));
  }
  return unit;
}

template <class T>
struct MeasureUnits {
  template <bool kClamps>
  static GF_HOST_DEVICE void each(const void* gradients, const void* weights, std::int64_t row_length,
                                  std::int64_t count, Arithmetic<T> limit, UnitSums* sums) {
    const T *g = static_cast<const T*>(gradients), *w = static_cast<const T*>(weights);
    for (std::int64_t unit = 0; unit < count; ++unit, g += row_length, w += row_length) {
      sums[unit] = measure_unit<kClamps>(g, w, row_length, limit);
    }
  }
  static GF_HOST_DEVICE void run(const void* g, const void* w, std::int64_t row_length, std::int64_t count,
                                 double limit, UnitSums* sums) {
    if (limit == INFINITY) return each<false>(g, w, row_length, count, INFINITY, sums);
    each<true>(g, w, row_length, count, static_cast<Arithmetic<T>>(limit), sums);
  }
  static void baseline(const void* g, const void* w, std::int64_t row_length, std::int64_t count, double limit,
                       UnitSums* sums) {
    run(g, w, row_length, count, limit, sums);
  }
  GF_TARGET_AVX2 static void avx2(const void* g, const void* w, std::int64_t row_length, std::int64_t count,
                                  double limit, UnitSums* sums) {
    run(g, w, row_length, count, limit, sums);
  }
  GF_TARGET_AVX512 static void avx512(const void* g, const void* w, std::int64_t row_length, std::int64_t count,
                                      double limit, UnitSums* sums) {
    run(g, w, row_length, count, limit, sums);
  }
};

}  // namespace

MeasureUnitsFunction measure_units_function(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return best_of<MeasureUnits<double>>();
    case DType::float16:
      return nullptr;
    case DType::bfloat16:
      return best_of<MeasureUnits<BFloat16>>();
    default:
      return best_of<MeasureUnits<float>>();
  }
}

}  // namespace gradfast::cpu

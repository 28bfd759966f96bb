// What a step must do, in float64 and in the words of the papers: written anew, not from csrc/rules.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "plan/problem.h"

namespace test {

using gradfast::DType;

// In the order of gradfast::Rules.
enum RuleIndex { kSgd, kSgdMomentum, kAdam, kAmsgrad, kLion, kClip, kRuleCount };

inline int state_count(int rule) {
  constexpr int counts[] = {0, 1, 2, 3, 1, 0};
  return rule < 0 ? 0 : counts[rule];
}

inline const char* name_of(int rule) {
  static const char* const names[] = {"sgd", "sgd momentum", "adam", "amsgrad", "lion", "clip"};
  return names[rule];
}

inline const char* name_of(DType dtype) {
  static const char* const names[] = {"float64", "float32", "float16", "bfloat16"};
  return names[static_cast<int>(dtype)];
}

inline std::size_t size_of(DType dtype) {
  constexpr std::size_t sizes[] = {8, 4, 2, 2};
  return sizes[static_cast<int>(dtype)];
}

inline DType dtype_of(gradfast::Format format) {
  switch (format) {
    case gradfast::Format::float16:
    case gradfast::Format::float16_by_chance:
      return DType::float16;
    case gradfast::Format::bfloat16:
    case gradfast::Format::bfloat16_by_chance:
      return DType::bfloat16;
    default:
      return DType::float32;
  }
}

// ---- stored numbers ------------------------------------------------------------------------------------------------

inline double decode(const void* at, DType dtype) {
  if (dtype == DType::float64) {
    double value;
    std::memcpy(&value, at, 8);
    return value;
  }
  if (dtype == DType::float32) {
    float value;
    std::memcpy(&value, at, 4);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, at, 2);
  const int exponent_bits = dtype == DType::float16 ? 5 : 8, fraction_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = fraction ? NAN : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(fraction, 1 - bias - fraction_bits);
  } else {
    value = std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  }
  return bits & 0x8000 ? -value : value;
}

inline void encode(double value, void* at, DType dtype) {
  const auto single = static_cast<float>(value);
  if (dtype == DType::float64) {
    std::memcpy(at, &value, 8);
  } else if (dtype == DType::float32) {
    std::memcpy(at, &single, 4);
  } else if (dtype == DType::float16) {
    const auto half = gradfast::narrow<gradfast::Half>(single);
    std::memcpy(at, &half, 2);
  } else {
    const auto brain = gradfast::narrow<gradfast::BFloat16>(single);
    std::memcpy(at, &brain, 2);
  }
}

// How far a stored result may be from the exact one: half a unit of its last place, and the rounding of the arithmetic
// (fp32, or fp64 for fp64) over about ten operations on terms that add up to `terms` in magnitude.
inline double tolerance(double exact, double terms, DType dtype) {
  constexpr double half_unit[] = {0x1p-53, 0x1p-24, 0x1p-11, 0x1p-8};
  constexpr double smallest[] = {0x1p-1074, 0x1p-149, 0x1p-25, 0x1p-134};
  const double arithmetic = dtype == DType::float64 ? 0x1p-53 : 0x1p-24;
  return half_unit[static_cast<int>(dtype)] * 1.001 * std::fabs(exact) + 10 * arithmetic * terms +
         smallest[static_cast<int>(dtype)];
}

// ---- one element ---------------------------------------------------------------------------------------------------

struct Value {
  double exact, terms;  // `terms`: the sum of the magnitudes that were added to make it
};

struct Updated {
  Value parameter, state[3];
};

inline double sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

inline Updated sgd(const double* h, bool with_momentum, double step, double scale, double p, double g,
                   const double* s) {
  const double lr = h[0], momentum = h[1], dampening = h[2], weight_decay = h[4], l1 = h[5];
  const bool nesterov = h[3] != 0, maximize = h[6] != 0;
  const double terms = std::fabs(scale * g) + std::fabs(weight_decay * p) + l1;
  g = (maximize ? -g : g) * scale + weight_decay * p + l1 * sign(p);
  Updated result{};
  Value update{g, terms};
  if (with_momentum) {
    const double kept = step == 1 ? 0 : momentum, taken = step == 1 ? 1 : 1 - dampening;
    result.state[0] = {kept * s[0] + taken * g, std::fabs(kept * s[0]) + taken * terms};
    update = result.state[0];
    if (nesterov) update = {g + momentum * update.exact, terms + momentum * update.terms};
  }
  result.parameter = {p - lr * update.exact, std::fabs(p) + lr * update.terms};
  return result;
}

inline Updated adam(const double* h, bool amsgrad, double step, double scale, double p, double g, const double* s) {
  const double lr = h[0], beta1 = h[1], beta2 = h[2], eps = h[3], weight_decay = h[4], l1 = h[5];
  const bool decoupled = h[6] != 0, maximize = h[7] != 0;
  double terms = std::fabs(scale * g);
  g = (maximize ? -g : g) * scale;
  if (decoupled) {
    p *= 1 - lr * weight_decay;
    p = sign(p) * std::fmax(std::fabs(p) - lr * l1, 0);
  } else {
    terms += std::fabs(weight_decay * p) + l1;
    g += weight_decay * p + l1 * sign(p);
  }
  Updated result{};
  const double m = beta1 * s[0] + (1 - beta1) * g, v = beta2 * s[1] + (1 - beta2) * g * g;
  const double m_terms = beta1 * std::fabs(s[0]) + (1 - beta1) * (terms + std::fabs(s[0]));
  const double v_terms = beta2 * s[1] + (1 - beta2) * terms * terms;
  result.state[0] = {m, m_terms};
  result.state[1] = {v, v_terms};
  double used = v;
  if (amsgrad) {
    used = std::fmax(v, s[2]);
    result.state[2] = {used, std::fmax(v_terms, s[2])};
  }
  const double denominator = std::sqrt(used / (1 - std::pow(beta2, step))) + eps;
  const double rate = lr / (1 - std::pow(beta1, step)) / denominator;
  // An error of v moves the square root by half of its relative size.
  const double from_v = used > 0 ? rate * std::fabs(m) * v_terms / used : 0;
  result.parameter = {p - rate * m, std::fabs(p) + lr * l1 + rate * m_terms + from_v};
  return result;
}

inline Updated lion(const double* h, double scale, double p, double g, const double* s) {
  const double lr = h[0], l1 = h[4], kept = p * (1 - lr * h[3]);
  g *= h[5] != 0 ? -scale : scale;
  const double decayed = sign(kept) * std::fmax(std::fabs(kept) - lr * l1, 0);
  return {{decayed - lr * sign(h[1] * s[0] + (1 - h[1]) * g), std::fabs(p) + lr * (l1 + 1)},
          {{h[2] * s[0] + (1 - h[2]) * g, std::fabs(s[0]) + std::fabs(g)}}};
}

inline Updated update(int rule, const double* h, double step, double scale, double p, double g, const double* states) {
  switch (rule) {
    case kSgd:
    case kSgdMomentum:
      return sgd(h, rule == kSgdMomentum, step, scale, p, g, states);
    case kAdam:
    case kAmsgrad:
      return adam(h, rule == kAmsgrad, step, scale, p, g, states);
    case kLion:
      return lion(h, scale, p, g, states);
    default:
      return {{scale * g, std::fabs(scale * g)}, {}};
  }
}

}  // namespace test

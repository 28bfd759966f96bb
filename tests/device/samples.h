// Hyper-parameters and formats that cases in several files step with.
#pragma once

#include <vector>

#include "oracle.h"

namespace test {

inline const std::vector<double> kSgdValues = {0.1, 0.9, 0.25, 1, 0.01, 0.001, 0};
inline const std::vector<double> kAdamValues = {0.01, 0.9, 0.99, 1e-3, 0.02, 0.001, 1, 0};
inline const std::vector<double> kLionValues = {0.01, 0.9, 0.99, 0.02, 0.001, 1};

inline const std::vector<double>& values_of(int rule) {
  if (rule == kLion) return kLionValues;
  return rule == kAdam || rule == kAmsgrad ? kAdamValues : kSgdValues;
}

// An fp32 master of Adam's with its states, the model's parameter, and a gradient.
inline gradfast::Formats masters_of(gradfast::Format parameter, gradfast::Format gradient) {
  gradfast::Formats formats;
  formats.array[gradfast::kGradient] = gradient;
  formats.array[gradfast::kFirstState + 2] = parameter;
  formats.has_copy = true;
  return formats;
}

inline const gradfast::Formats kMasters = masters_of(gradfast::Format::bfloat16, gradfast::Format::bfloat16);
inline const gradfast::Formats kHalves = masters_of(gradfast::Format::float16, gradfast::Format::float16);

}  // namespace test

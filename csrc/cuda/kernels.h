// The kernels as the host sees them: addresses to launch, for each storage type and rule.
#pragma once

#include <array>

#include "table.h"

namespace gradfast::cuda {

struct Kernel {
  const void* with_small_arguments = nullptr;
  const void* with_large_arguments = nullptr;
};

template <class List>
inline constexpr int kLengthOf = 0;
template <class... Rule>
inline constexpr int kLengthOf<RuleList<Rule...>> = sizeof...(Rule);
inline constexpr int kRules = kLengthOf<Rules>;

struct Kernels {
  std::array<Kernel, kRules> step;  // in the order of Rules
  Kernel measure;
};

// Each in a source file of its own, so that they compile in parallel.
const Kernels& float64_kernels();
const Kernels& float32_kernels();
const Kernels& float16_kernels();
const Kernels& bfloat16_kernels();
const Kernel& report_kernels();

inline const Kernels& kernels_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return float64_kernels();
    case DType::float16:
      return float16_kernels();
    case DType::bfloat16:
      return bfloat16_kernels();
    default:
      return float32_kernels();
  }
}

inline std::size_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

}  // namespace gradfast::cuda

// The kernels as the host sees them: addresses to launch, for each storage type and rule.
//
// A storage type is that of all arrays of a tensor; for tensors whose arrays differ there is one more, `mixed`.
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
const Kernels& mixed_kernels();
const Kernel& report_kernels();

enum class StorageKind : int { float64, float32, float16, bfloat16, mixed };

inline StorageKind storage_of(const Slot& slot) {
  return slot.mixed ? StorageKind::mixed : static_cast<StorageKind>(slot.dtype);
}

inline const Kernels& kernels_of(StorageKind storage) {
  switch (storage) {
    case StorageKind::float64:
      return float64_kernels();
    case StorageKind::float16:
      return float16_kernels();
    case StorageKind::bfloat16:
      return bfloat16_kernels();
    case StorageKind::mixed:
      return mixed_kernels();
    default:
      return float32_kernels();
  }
}

inline int element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

}  // namespace gradfast::cuda

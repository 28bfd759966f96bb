// From torch tensors to the plain Slots of a Problem: dtypes, layouts, and refusals that name the parameter.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "plan/problem.h"

namespace gradfast {

// Refuses what no backend can step: sparse, quantised or integer tensors, tensor subclasses without plain storage,
// elements that share memory when `written`. `what` and `name` begin the message: "the gradient of 'fc.weight'".
void check_tensor(const at::Tensor& tensor, const char* what, const std::string& name, bool written);

// Refuses complex tensors, for clipping by value.
void check_ordered(const at::Tensor& tensor, const std::string& name);

bool is_narrow(at::ScalarType dtype);  // fp16 or bf16

// True for dtypes that one tensor's arrays may have beside each other: those that are computed in fp32, or the same.
bool go_together(at::ScalarType a, at::ScalarType b);

// Refuses a gradient or state whose shape or device is not the parameter's, or whose dtype does not go with it.
void check_match(const at::Tensor& parameter, const at::Tensor& other, const char* what, const std::string& name);

// How a parameter is kept and rounded.
struct Precision {
  bool has_master = false;           // the first of its arrays is its fp32 master, the last the parameter itself
  bool parameter_by_chance = false;  // a 16-bit parameter without a master is rounded by chance
  bool states_by_chance = false;     // 16-bit states are
};

// A unit of AGC: one index of the first dimension, in real numbers; of a vector or a scalar, all of it.
inline std::int64_t row_length_of(const at::Tensor& tensor) {
  const std::int64_t elements = tensor.numel() * (tensor.is_complex() ? 2 : 1);
  return tensor.dim() > 1 && elements > 0 ? elements / tensor.size(0) : elements;
}

// True if units follow each other in the memory of a dense tensor, each without a gap.
inline bool has_rows_in_order(const at::Tensor& tensor) {
  return tensor.dim() <= 1 || tensor.size(0) == 1 || tensor.stride(0) * tensor.size(0) == tensor.numel();
}

inline constexpr int kNotByUnits = -1;

// Appends the slot of one parameter. `arrays`: as in Slot, all of one shape. A Layout is appended to `problem` where
// memory order would not pair the right elements, or not find the units. `weights`: as in Slot, or kNotByUnits.
void add_slot(at::TensorList arrays, float* step, int group, const std::string& name, Problem* problem,
              const Precision& precision = {}, int weights = kNotByUnits);

// Tells autograd that `tensor` was written, as torch's own in-place operators do.
inline void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

inline std::int64_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : static_cast<std::int64_t>(tensor._version());
}

}  // namespace gradfast

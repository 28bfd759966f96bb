#include "binding/slots.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/DispatchKey.h>

#include <algorithm>

#include "binding/array_kind.h"

namespace gradfast {
namespace {

bool dtype_of(const at::Tensor& tensor, DType* dtype) {
  switch (c10::toRealValueType(tensor.scalar_type())) {
    case at::kFloat:
      *dtype = DType::float32;
      return true;
    case at::kDouble:
      *dtype = DType::float64;
      return true;
    case at::kHalf:
      *dtype = DType::float16;
      return true;
    case at::kBFloat16:
      *dtype = DType::bfloat16;
      return true;
    default:
      return false;
  }
}

Format format_of(const at::Tensor& tensor, bool by_chance) {
  switch (c10::toRealValueType(tensor.scalar_type())) {
    case at::kHalf:
      return by_chance ? Format::float16_by_chance : Format::float16;
    case at::kBFloat16:
      return by_chance ? Format::bfloat16_by_chance : Format::bfloat16;
    default:
      return Format::float32;
  }
}

// The formats of a slot's arrays. True if the slot is mixed.
bool find_formats(at::TensorList arrays, const Precision& precision, Formats* formats) {
  const at::ScalarType dtype = c10::toRealValueType(arrays.front().scalar_type());
  if (dtype != at::kFloat && !is_narrow(dtype)) return false;
  bool mixed = precision.has_master;
  formats->has_copy = precision.has_master;
  for (std::size_t a = 0; a < arrays.size(); ++a) {
    const bool is_copy = precision.has_master && a + 1 == arrays.size();
    const bool by_chance =
        a == kParameter ? precision.parameter_by_chance : a != kGradient && !is_copy && precision.states_by_chance;
    formats->array[a] = format_of(arrays[a], by_chance && !arrays[a].is_complex());
    mixed |= c10::toRealValueType(arrays[a].scalar_type()) != dtype || is_by_chance(formats->array[a]);
  }
  return mixed;
}

bool share_memory_order(at::TensorList arrays) {
  const at::Tensor& first = arrays.front();
  if (!first.is_non_overlapping_and_dense()) return false;
  return std::all_of(arrays.begin(), arrays.end(), [&](const at::Tensor& array) { return same_order(array, first); });
}

// A complex element is two real ones: one more dimension of size 2 and stride 1.
Layout layout_of(at::TensorList arrays, const std::string& name) {
  const bool complex = arrays.front().is_complex();
  std::vector<std::int64_t> sizes = arrays.front().sizes().vec();
  std::vector<std::vector<std::int64_t>> strides;
  for (const at::Tensor& array : arrays) {
    strides.push_back(array.strides().vec());
    if (!complex) continue;
    for (std::int64_t& stride : strides.back()) stride *= 2;
    strides.back().push_back(1);
  }
  if (complex) sizes.push_back(2);
  Layout layout;
  TORCH_CHECK(make_layout(sizes, strides, &layout), "gradfast: '", name, "' has more than ", kMaxDimensions,
              " dimensions that cannot be merged; make the tensor and its gradient contiguous");
  return layout;
}

}  // namespace

void check_ordered(const at::Tensor& tensor, const std::string& name) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor.is_complex(), "gradfast: complex values have no order to clip by: '", name, "'");
}

bool is_narrow(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

bool go_together(at::ScalarType a, at::ScalarType b) {
  return a == b || ((a == at::kFloat || is_narrow(a)) && (b == at::kFloat || is_narrow(b)));
}

void check_tensor(const at::Tensor& tensor, const char* what, const std::string& name, bool written) {
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == at::kStrided, "gradfast: ", what, " of '", name, "' is sparse (",
                              tensor.layout(),
                              "); use sparse=False in the layer that makes it, or torch.optim.SparseAdam or "
                              "torch.optim.SGD for this parameter");
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::Python),
                              "gradfast: ", what, " of '", name,
                              "' is a tensor subclass without plain storage; pass plain tensors or DTensors");
  DType dtype;
  TORCH_CHECK_TYPE(dtype_of(tensor, &dtype), "gradfast: ", what, " of '", name, "' has dtype ", tensor.scalar_type(),
                   "; float64, float32, float16, bfloat16 and their complex kinds are supported");
  if (written && at::has_internal_overlap(tensor) == at::MemOverlap::Yes) {
    TORCH_CHECK(false, "gradfast: ", what, " of '", name, "' of shape ", tensor.sizes(), " and strides ",
                tensor.strides(), " has several elements in one place in memory; clone it before the step");
  }
}

void check_match(const at::Tensor& parameter, const at::Tensor& other, const char* what, const std::string& name) {
  TORCH_CHECK_VALUE(other.sizes() == parameter.sizes(), "gradfast: ", what, " of '", name, "' has shape ",
                    other.sizes(), ", the parameter has ", parameter.sizes());
  TORCH_CHECK_TYPE(go_together(other.scalar_type(), parameter.scalar_type()), "gradfast: ", what, " of '", name,
                   "' has dtype ", other.scalar_type(), ", the parameter has ", parameter.scalar_type());
  TORCH_CHECK_VALUE(other.device() == parameter.device(), "gradfast: ", what, " of '", name, "' is on ", other.device(),
                    ", the parameter is on ", parameter.device());
}

void add_slot(at::TensorList arrays, float* step, int group, const std::string& name, Problem* problem,
              const Precision& precision, int weights) {
  Slot slot;
  dtype_of(arrays[kGradient], &slot.dtype);
  slot.mixed = find_formats(arrays, precision, &slot.formats);
  slot.elements = arrays.front().numel() * (arrays.front().is_complex() ? 2 : 1);
  slot.group = group;
  slot.step = step;
  for (std::size_t a = 0; a < arrays.size(); ++a) slot.arrays[a] = arrays[a].data_ptr();
  bool in_memory_order = share_memory_order(arrays);
  if (weights != kNotByUnits) {
    slot.weights = weights;
    slot.row_length = row_length_of(arrays.front());
    in_memory_order &= has_rows_in_order(arrays.front());
  }
  if (!in_memory_order && slot.elements > 1) {
    slot.layout = static_cast<std::int32_t>(problem->layouts.size());
    problem->layouts.push_back(layout_of(arrays, name));
  }
  problem->slots.push_back(slot);
}

}  // namespace gradfast

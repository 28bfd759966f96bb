// What a Slot takes for granted of a tensor beside its address. Between two steps Python may give a tensor other data,
// or exchange it for another: comparing its kind with that of last time costs a few nanoseconds, a full check hundreds.
#pragma once

#include <ATen/core/Tensor.h>

namespace gradfast {

class ArrayKind {
 public:
  ArrayKind() = default;
  explicit ArrayKind(const at::Tensor& tensor)
      : keys_(tensor.key_set()), device_(tensor.device()), dtype_(tensor.dtype()), bytes_(tensor.itemsize()) {}

  // True for a tensor of the same kind (backend, plain storage, no subclass, not lazily conjugated), dtype and device.
  bool describes(const at::Tensor& tensor) const {
    const c10::TensorImpl& inner = *tensor.unsafeGetTensorImpl();
    return inner.key_set() == keys_ && inner.dtype() == dtype_ && inner.device() == device_;
  }

  // As Tensor::data_ptr, of a tensor that this describes, without asking again what it is.
  void* address(const at::Tensor& tensor) const {
    const c10::TensorImpl& inner = *tensor.unsafeGetTensorImpl();
    return static_cast<char*>(inner.unsafe_storage().mutable_data()) + inner.storage_offset() * bytes_;
  }

 private:
  c10::DispatchKeySet keys_;
  at::Device device_ = at::kCPU;
  caffe2::TypeMeta dtype_;
  std::int32_t bytes_ = 0;
};

// True when the tensors have one shape, and memory order pairs the same elements of both. The stride of a dimension of
// size one means nothing, and convolutions leave all kinds of values in it.
inline bool same_order(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_same(b)) return true;
  const at::IntArrayRef sizes = a.sizes(), other_sizes = b.sizes();
  if (sizes.size() != other_sizes.size()) return false;
  const at::IntArrayRef strides = a.strides(), other_strides = b.strides();
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != other_sizes[d] || (strides[d] != other_strides[d] && sizes[d] != 1)) return false;
  }
  return true;
}

}  // namespace gradfast

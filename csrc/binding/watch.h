// A tensor that the engine keeps from step to step, such as a state: is it still where it was, and did nobody but the
// engine write into it since? That takes a look at three cache lines, the beginnings of torch's tensor, storage and
// version counter, and not at sizes and strides: what changes those in place counts the version up, and what gives a
// tensor other data (`tensor.data = ...`, a storage that is emptied and filled again) gives it another storage, or
// another address in it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>

namespace gradfast {

class Watch {
 public:
  Watch() = default;
  explicit Watch(const at::Tensor& tensor)
      : storage_(storage_of(tensor)),
        data_(storage_ == nullptr ? nullptr : storage_->mutable_data()),
        version_(storage_ == nullptr || tensor.is_inference() ? kUncounted : version_of(tensor)) {}

  // `tensor` is the one that the Watch was made of.
  bool is_unchanged(const at::Tensor& tensor) const {
    return storage_of(tensor) == storage_ && version_ != kUncounted && storage_->mutable_data() == data_ &&
           version_of(tensor) == version_;
  }

  // Tells autograd that the tensor is written, as torch's own in-place operators do.
  void bump_version(const at::Tensor& tensor) {
    if (version_ == kUncounted) return;
    tensor.unsafeGetTensorImpl()->bump_version();
    ++version_;
  }

  // Fetches what is_unchanged() and bump_version() will look at: first tensor and storage; and, once the tensor is
  // there, the version counter, whose address is torch's secret, but the only thing in its struct.
  void prefetch(const at::Tensor& tensor) const {
    __builtin_prefetch(tensor.unsafeGetTensorImpl());
    __builtin_prefetch(storage_);
    __builtin_prefetch(reinterpret_cast<const char*>(storage_) + 48);
  }
  static void prefetch_version(const at::Tensor& tensor) {
    const c10::VariableVersion& version = tensor.unsafeGetTensorImpl()->version_counter();
    const void* counter;
    static_assert(sizeof counter == sizeof version);
    std::memcpy(&counter, &version, sizeof counter);
    __builtin_prefetch(counter, 1);
  }

 private:
  static constexpr std::int64_t kUncounted = -1;  // never unchanged: tensors made in inference mode count no versions

  static c10::StorageImpl* storage_of(const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  }
  static std::int64_t version_of(const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->version_counter().current_version();
  }

  c10::StorageImpl* storage_ = nullptr;
  const void* data_ = nullptr;
  std::int64_t version_ = kUncounted;
};

}  // namespace gradfast

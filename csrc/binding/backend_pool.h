// Backends for operators, which come and go with each call: made once, then lent out again and again.
//
// A CUDA backend's buffers may still be in use when the call returns, so it goes back to the pool of its stream, where
// the next borrower's work is queued behind.
#pragma once

#include <c10/core/Stream.h>

#include <memory>

#include "binding/backend.h"

namespace gradfast {

class BackendLease {
 public:
  explicit BackendLease(at::Device device);
  BackendLease(BackendLease&&) = default;
  BackendLease& operator=(BackendLease&&) = default;
  ~BackendLease();

  Backend* operator->() const { return backend_.get(); }

 private:
  c10::Stream stream_;
  std::unique_ptr<Backend> backend_;
};

}  // namespace gradfast

// What the engine and the operators ask of a device, whatever the device.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "plan/problem.h"

namespace gradfast {

class Backend {
 public:
  virtual ~Backend() = default;

  // See cpu/stepper.h and cuda/stepper.h. `total` is a 0-d double tensor on this device, for the phases that take one.
  virtual void run(const Problem& problem, bool changed, Phase phase, const at::Tensor& total) = 0;

  // Copies of what the last run left, as double tensors on the device; nothing waits.
  virtual at::Tensor sum() = 0;          // 0-d: sum of powers over all slots
  virtual at::Tensor norm() = 0;         // 0-d
  virtual at::Tensor coefficient() = 0;  // 0-d
  virtual at::Tensor tensor_sums() = 0;  // one value a slot
  virtual at::Tensor update_sums() = 0;  // likewise, sums of squared updates, where those are clipped

  // Likewise, a 0-d float tensor: 1 if the last run's norm was not finite.
  virtual at::Tensor found_infinite() = 0;

  // The whole report on the host: waits for the device.
  virtual Report report() = 0;
  // A copy of it on the device, as bytes: nothing waits.
  virtual at::Tensor report_bytes() = 0;

  // True when report() is there at once.
  virtual bool is_host() const = 0;
};

// What report_bytes() gave, once it is on the host.
Report report_of(const at::Tensor& bytes);

// A backend for tensors on `device`. Throws for a device that this build does not serve.
std::unique_ptr<Backend> make_backend(at::Device device);

// In a build with CUDA; elsewhere throws.
std::unique_ptr<Backend> make_cuda_backend(at::Device device);

}  // namespace gradfast

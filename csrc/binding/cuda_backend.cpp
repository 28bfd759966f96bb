#include "binding/backend.h"

#ifdef GRADFAST_WITH_CUDA
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstddef>

#include "cuda/stepper.h"
#endif

namespace gradfast {

#ifdef GRADFAST_WITH_CUDA
namespace {

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(at::Device device) : device_(device), stepper_(device.index()) {}

  void run(const Problem& problem, bool changed, Phase phase, const at::Tensor& total) override {
    const c10::cuda::CUDAGuard guard(device_);
    slots_ = static_cast<std::int64_t>(problem.slots.size());
    const double* given = total.defined() ? total.data_ptr<double>() : nullptr;
    stepper_.run(problem, changed, phase, given, c10::cuda::getCurrentCUDAStream(device_.index()).stream());
  }

  at::Tensor sum() override { return copy(&stepper_.report()->sum, {}); }
  at::Tensor norm() override { return copy(&stepper_.report()->norm, {}); }
  at::Tensor coefficient() override { return copy(&stepper_.report()->coefficient, {}); }
  at::Tensor tensor_sums() override { return copy(stepper_.tensor_sums(), {slots_}); }
  at::Tensor update_sums() override { return copy(stepper_.update_sums(), {slots_}); }
  at::Tensor found_infinite() override { return copy(&stepper_.report()->found_infinite, {}); }

  Report report() override {
    const c10::cuda::CUDAGuard guard(device_);
    const auto stream = c10::cuda::getCurrentCUDAStream(device_.index());
    Report report;
    C10_CUDA_CHECK(cudaMemcpyAsync(&report, stepper_.report(), sizeof report, cudaMemcpyDeviceToHost, stream));
    stream.synchronize();
    return report;
  }

  at::Tensor report_bytes() override {
    const c10::cuda::CUDAGuard guard(device_);
    const auto options = at::TensorOptions().dtype(at::kByte).device(device_);
    return at::from_blob(const_cast<Report*>(stepper_.report()), {sizeof(Report)}, options).clone();
  }

  bool is_host() const override { return false; }

 private:
  template <class Value>
  at::Tensor copy(const Value* values, at::IntArrayRef sizes) const {
    const c10::cuda::CUDAGuard guard(device_);
    const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<Value>::value).device(device_);
    return at::from_blob(const_cast<Value*>(values), sizes, options).clone();
  }

  at::Device device_;
  cuda::Stepper stepper_;
  std::int64_t slots_ = 0;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(at::Device device) { return std::make_unique<CudaBackend>(device); }

#else

std::unique_ptr<Backend> make_cuda_backend(at::Device device) {
  TORCH_CHECK(false, "gradfast: a tensor is on '", device.str(),
              "' but gradfast was built for the CPU only; rebuild it with GRADFAST_CUDA=1 pip install "
              "--no-build-isolation --force-reinstall --no-deps .");
}

#endif

}  // namespace gradfast

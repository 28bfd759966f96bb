#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <cstring>

#include "binding/backend.h"
#include "cpu/stepper.h"

namespace gradfast {
namespace {

class CpuBackend final : public Backend {
 public:
  void run(const Problem& problem, bool changed, Phase phase, const at::Tensor& total) override {
    const double given = total.defined() ? total.item<double>() : 0.0;
    const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    stepper_.run(problem, changed, phase, given, threads);
  }

  at::Tensor sum() override { return scalar(stepper_.report().sum); }
  at::Tensor norm() override { return scalar(stepper_.report().norm); }
  at::Tensor coefficient() override { return scalar(stepper_.report().coefficient); }
  at::Tensor tensor_sums() override { return vector(stepper_.tensor_sums()); }
  at::Tensor update_sums() override { return vector(stepper_.update_sums()); }
  at::Tensor found_infinite() override { return scalar(stepper_.report().found_infinite).to(at::kFloat); }
  Report report() override { return stepper_.report(); }
  at::Tensor report_bytes() override {
    at::Tensor bytes = at::empty({sizeof(Report)}, at::kByte);
    std::memcpy(bytes.data_ptr(), &stepper_.report(), sizeof(Report));
    return bytes;
  }
  bool is_host() const override { return true; }

 private:
  static at::Tensor vector(const std::vector<double>& values) {
    at::Tensor result = at::empty({static_cast<std::int64_t>(values.size())}, at::kDouble);
    std::copy(values.begin(), values.end(), result.data_ptr<double>());
    return result;
  }
  static at::Tensor scalar(double value) { return at::scalar_tensor(value, at::kDouble); }

  cpu::Stepper stepper_;
};

}  // namespace

Report report_of(const at::Tensor& bytes) {
  TORCH_CHECK_VALUE(bytes.is_cpu() && bytes.is_contiguous() && bytes.nbytes() == sizeof(Report),
                    "gradfast: not the bytes of a report");
  Report report;
  std::memcpy(&report, bytes.data_ptr(), sizeof report);
  return report;
}

std::unique_ptr<Backend> make_backend(at::Device device) {
  if (device.is_cpu()) return std::make_unique<CpuBackend>();
  if (device.is_cuda()) return make_cuda_backend(device);
  TORCH_CHECK(false, "gradfast: tensors on device '", device.str(), "' are not supported; CPU and CUDA are");
}

}  // namespace gradfast

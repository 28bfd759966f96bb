// A model's tensors in device memory: filled at random, stepped by a Stepper, and compared with the oracle bit of
// memory by bit of memory. What lies between and around the elements must stay as it was.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/stepper.h"
#include "oracle.h"

namespace test {

void require(cudaError_t error, const char* what);

// Bytes in device memory with an image on the host.
class Memory {
 public:
  explicit Memory(std::size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::byte* device = nullptr;
  std::vector<std::byte> host;
  void upload();
  void download();
};

struct Shape {
  std::vector<std::int64_t> sizes;
  // Strides in elements of each array; empty: dense and row-major.
  std::array<std::vector<std::int64_t>, gradfast::kMaxArrays> strides{};
  std::array<int, gradfast::kMaxArrays> shift{};  // elements between a 16-byte boundary and the first
  bool needs_layout = false;
};

inline Shape vector_of(std::int64_t elements) { return Shape{{elements}}; }

// Arrays that do not share one dense layout; `rest`: strides of the states, and of a master's copy.
inline Shape strided(std::vector<std::int64_t> sizes, std::vector<std::int64_t> parameter,
                     std::vector<std::int64_t> gradient, const std::vector<std::int64_t>& rest) {
  Shape shape{std::move(sizes)};
  shape.strides.fill(rest);
  shape.strides[gradfast::kParameter] = std::move(parameter);
  shape.strides[gradfast::kGradient] = std::move(gradient);
  shape.needs_layout = true;
  return shape;
}

// Begins each array at another distance from a 16-byte boundary; `shift` counts on from tensor to tensor.
inline void misalign(Shape& shape, int& shift, DType dtype) {
  for (int& each : shape.shift) each = (shift += 3) % (16 / static_cast<int>(size_of(dtype)));
}

class Model {
 public:
  explicit Model(std::uint32_t seed = 1) : random_(seed) {}

  gradfast::Norm norm;
  gradfast::ClipSettings clip;  // its units before tensors are added
  double loss_scale = 1;        // other than 1: given to the step, and the gradients carry it
  bool found_infinite = false;  // given to the step when true
  double largest_gradient = 1;
  double policy_coefficient = 1;  // what clip.policies are expected to make of the next step
  bool policy_skip = false;
  std::vector<double> tensor_coefficients;  // and of each tensor on top; empty: nothing
  bool clips_updates = false;               // as in Problem

  int add_group(int rule, std::vector<double> values);
  void set_lr_on_device(int group, double lr, bool as_double);
  int add(const Shape& shape, DType dtype, int group, float updates_so_far = 0);
  // A tensor whose arrays differ. `formats`: of parameter, gradient, states and, where it has one, the master's copy.
  int add_mixed(const Shape& shape, const gradfast::Formats& formats, int group, float updates_so_far = 0);
  void fill_gradients();
  // One element of a gradient, in place.
  void set_gradient(int tensor, std::int64_t element, double value);
  void zero_parameters();
  double stored(int tensor, int array, std::int64_t element);  // as it is in device memory now
  void move_gradients();  // to other addresses, as a training loop that frees them does

  gradfast::Problem& problem() { return problem_; }
  std::size_t tensors() const { return tensors_.size(); }

  // Runs one step and checks everything that it did.
  void step_and_check(gradfast::cuda::Stepper& stepper, bool changed, cudaStream_t stream = nullptr);
  // The same in three: what stands in memory now; then any way of running it; then the check.
  void remember();
  void run(gradfast::cuda::Stepper& stepper, bool changed, gradfast::Phase phase, cudaStream_t stream,
           const double* total = nullptr);
  void check_step(gradfast::cuda::Stepper& stepper);
  // The last two in one: a whole step, in one run or measured and updated apart.
  void run_and_check(gradfast::cuda::Stepper& stepper, bool changed, bool in_phases, cudaStream_t stream = nullptr);
  void check_unchanged();
  void check_report(const gradfast::Report& report);

  gradfast::Report report(const gradfast::cuda::Stepper& stepper) const;
  std::vector<std::byte> bytes();  // of all arrays, for comparing runs bit for bit
  double expected_sum() const;
  double expected_sum(std::size_t tensor) const { return sum_of(tensors_[tensor]); }
  double expected_rate(std::size_t tensor) const;  // update clipping's factor on its learning rate, after check_step
  double expected_update_sum(std::size_t tensor) const;  // of squares, which that comes from
  const std::vector<double>& expected_unit_factors(std::size_t tensor) const { return tensors_[tensor].unit_factors; }
  std::int64_t skipped_steps = 0;

 private:
  struct Tensor {
    Shape shape;
    std::array<DType, gradfast::kMaxArrays> dtypes;
    std::int64_t elements;
    gradfast::Formats formats;  // where `mixed`
    bool mixed = false;
    bool in_place = false;                        // the gradient is the parameter, and no array of its own
    std::vector<std::unique_ptr<Memory>> arrays;  // in the order of Slot::arrays
    std::vector<std::vector<std::byte>> before;   // their bytes when remember() was called
    float updates_before = 0;
    std::vector<double> unit_factors;  // of the step to come; none where units are left alone
  };

  std::int64_t position(const Tensor& tensor, int array, std::int64_t element) const;
  std::size_t offset(const Tensor& tensor, int array, std::int64_t element) const;
  double value(const Tensor& tensor, int array, std::int64_t element) const;
  double gradient(const Tensor& tensor, std::int64_t element) const;  // in memory, as the step clips it before the norm
  double clamped(const Tensor& tensor, std::int64_t element) const;
  static int gradient_array(const Tensor& tensor);
  std::vector<double> find_unit_factors(std::size_t index) const;
  double sum_of(const Tensor& tensor) const;
  double join(double a, double b) const;
  int add(const Shape& shape, Tensor tensor, int group, float updates_so_far);
  void fill(Tensor& tensor, int array, double from, double to);
  void check_tensor(std::size_t index, double scale, bool skipped);
  void give_scalars();

  std::mt19937 random_;
  gradfast::Problem problem_;
  std::vector<Tensor> tensors_;
  std::vector<double> clip_factors_;  // of each tensor in the last step, without the loss scale
  std::vector<std::unique_ptr<Memory>> steps_, rates_, scalars_, retired_;
};

}  // namespace test

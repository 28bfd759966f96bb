#include "model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace test {

using gradfast::kFirstState;
using gradfast::kGradient;
using gradfast::kMaxArrays;
using gradfast::kParameter;
using gradfast::NormKind;
using gradfast::Phase;
using gradfast::Report;

namespace {

constexpr std::size_t kGuardBytes = 64;  // before and behind every array; keeps its alignment to 16 bytes

}  // namespace

void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

Memory::Memory(std::size_t bytes) : host(bytes) {
  void* address = nullptr;
  require(cudaMalloc(&address, bytes), "cudaMalloc");
  device = static_cast<std::byte*>(address);
}

Memory::~Memory() { cudaFree(device); }

void Memory::upload() { require(cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice), "upload"); }

void Memory::download() { require(cudaMemcpy(host.data(), device, host.size(), cudaMemcpyDeviceToHost), "download"); }

int Model::add_group(int rule, std::vector<double> values) {
  gradfast::Group group;
  group.rule = rule;
  std::copy(values.begin(), values.end(), group.values.value);
  problem_.groups.push_back(group);
  return static_cast<int>(problem_.groups.size()) - 1;
}

void Model::set_lr_on_device(int group, double lr, bool as_double) {
  auto memory = std::make_unique<Memory>(sizeof(double));
  encode(lr, memory->host.data(), as_double ? DType::float64 : DType::float32);
  memory->upload();
  problem_.groups[group].lr = memory->device;
  problem_.groups[group].lr_is_double = as_double;
  // The oracle looks here; the step must not.
  problem_.groups[group].values.value[0] = decode(memory->host.data(), as_double ? DType::float64 : DType::float32);
  rates_.push_back(std::move(memory));
}

std::int64_t Model::position(const Tensor& tensor, int array, std::int64_t element) const {
  const auto& strides = tensor.shape.strides[array];
  if (strides.empty()) return element;
  std::int64_t at = 0;
  for (std::size_t d = tensor.shape.sizes.size(); d-- > 0;) {
    at += element % tensor.shape.sizes[d] * strides[d];
    element /= tensor.shape.sizes[d];
  }
  return at;
}

std::size_t Model::offset(const Tensor& tensor, int array, std::int64_t element) const {
  return kGuardBytes + (tensor.shape.shift[array] + position(tensor, array, element)) * size_of(tensor.dtypes[array]);
}

double Model::value(const Tensor& tensor, int array, std::int64_t element) const {
  return decode(tensor.before[array].data() + offset(tensor, array, element), tensor.dtypes[array]);
}

void Model::fill(Tensor& tensor, int array, double from, double to) {
  std::uniform_real_distribution<double> values(from, to);
  Memory& memory = *tensor.arrays[array];
  for (std::int64_t e = 0; e < tensor.elements; ++e) {
    encode(values(random_), memory.host.data() + offset(tensor, array, e), tensor.dtypes[array]);
  }
  memory.upload();
}

int Model::add(const Shape& shape, DType dtype, int group, float updates_so_far) {
  Tensor tensor{};
  tensor.shape = shape;
  tensor.dtypes.fill(dtype);
  return add(shape, std::move(tensor), group, updates_so_far);
}

int Model::add_mixed(const Shape& shape, const gradfast::Formats& formats, int group, float updates_so_far) {
  Tensor tensor{};
  tensor.shape = shape;
  tensor.formats = formats;
  tensor.mixed = true;
  for (int a = 0; a < kMaxArrays; ++a) tensor.dtypes[a] = dtype_of(formats.array[a]);
  return add(shape, std::move(tensor), group, updates_so_far);
}

int Model::add(const Shape& shape, Tensor tensor, int group, float updates_so_far) {
  tensor.elements = 1;
  for (const std::int64_t size : shape.sizes) tensor.elements *= size;
  const int rule = problem_.groups[group].rule;
  const bool by_units = gradfast::clips_units(clip.units);
  const bool in_place = tensor.in_place = rule == kClip;  // the gradient itself is updated
  // Where that is clipped by units, the weights stand where states would.
  const int arrays = kFirstState + state_count(rule) + tensor.formats.has_copy + (in_place && by_units);
  gradfast::Slot slot;
  for (int a = 0; a < arrays; ++a) {
    if (in_place && a == kGradient) {
      slot.arrays[a] = slot.arrays[kParameter];
      continue;
    }
    std::int64_t last = -1;
    for (std::int64_t e = 0; e < tensor.elements; ++e) last = std::max(last, position(tensor, a, e));
    const std::size_t bytes = 2 * kGuardBytes + (shape.shift[a] + last + 1) * size_of(tensor.dtypes[a]);
    tensor.arrays.push_back(std::make_unique<Memory>(bytes));
    for (std::byte& byte : tensor.arrays.back()->host) byte = static_cast<std::byte>(random_());
    const bool square = a >= kFirstState + 1;  // Adam's second moments are not negative
    fill(tensor, static_cast<int>(tensor.arrays.size()) - 1, square ? 0 : -1, 1);
    slot.arrays[a] = tensor.arrays.back()->device + kGuardBytes + shape.shift[a] * size_of(tensor.dtypes[a]);
  }
  if (in_place) {  // one array under two numbers: keep the list in the slots' order
    slot.arrays[kGradient] = slot.arrays[kParameter];
  }
  auto step = std::make_unique<Memory>(sizeof(float));
  encode(updates_so_far, step->host.data(), DType::float32);
  step->upload();
  slot.step = reinterpret_cast<float*>(step->device);
  steps_.push_back(std::move(step));
  slot.elements = tensor.elements;
  if (by_units) {
    slot.row_length =
        shape.sizes.size() > 1 && tensor.elements > 0 ? tensor.elements / shape.sizes[0] : tensor.elements;
    slot.weights = in_place ? kFirstState : kParameter;
  }
  slot.group = group;
  slot.dtype = tensor.dtypes[kGradient];
  slot.mixed = tensor.mixed;
  slot.formats = tensor.formats;
  slot.number = static_cast<std::uint32_t>(tensors_.size());
  if (shape.needs_layout) {
    std::vector<std::vector<std::int64_t>> strides;
    for (int a = 0; a < arrays; ++a) strides.push_back(shape.strides[a]);
    gradfast::Layout layout;
    if (!gradfast::make_layout(shape.sizes, strides, &layout)) throw std::runtime_error("too many dimensions");
    slot.layout = static_cast<int>(problem_.layouts.size());
    problem_.layouts.push_back(layout);
  }
  problem_.slots.push_back(slot);
  tensors_.push_back(std::move(tensor));
  return static_cast<int>(tensors_.size()) - 1;
}

void Model::fill_gradients() {
  for (Tensor& tensor : tensors_) {
    fill(tensor, gradient_array(tensor), -largest_gradient, largest_gradient);
  }
}

void Model::set_gradient(int index, std::int64_t element, double value) {
  Tensor& tensor = tensors_[index];
  const int array = gradient_array(tensor);
  encode(value, tensor.arrays[array]->host.data() + offset(tensor, array, element), tensor.dtypes[array]);
  tensor.arrays[array]->upload();
}

void Model::zero_parameters() {
  for (Tensor& tensor : tensors_) fill(tensor, kParameter, 0, 0);
}

double Model::stored(int index, int array, std::int64_t element) {
  Tensor& tensor = tensors_[index];
  tensor.arrays[array]->download();
  return decode(tensor.arrays[array]->host.data() + offset(tensor, array, element), tensor.dtypes[array]);
}

void Model::move_gradients() {
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    Tensor& tensor = tensors_[t];
    if (tensor.in_place) throw std::runtime_error("the gradient is the parameter");
    auto moved = std::make_unique<Memory>(tensor.arrays[kGradient]->host.size());
    moved->host = tensor.arrays[kGradient]->host;
    moved->upload();
    problem_.slots[t].arrays[kGradient] =
        moved->device + kGuardBytes + tensor.shape.shift[kGradient] * size_of(tensor.dtypes[kGradient]);
    std::swap(moved, tensor.arrays[kGradient]);
    retired_.push_back(std::move(moved));  // something in flight may still read it
  }
}

void Model::give_scalars() {
  const auto scalar = [&](double value) {
    scalars_.push_back(std::make_unique<Memory>(sizeof(float)));
    encode(value, scalars_.back()->host.data(), DType::float32);
    scalars_.back()->upload();
    return reinterpret_cast<const float*>(scalars_.back()->device);
  };
  problem_.loss_scale = loss_scale != 1 ? scalar(loss_scale) : nullptr;
  problem_.found_infinite = found_infinite ? scalar(1) : nullptr;
  problem_.norm = norm;
  problem_.clip = clip;
  problem_.clips_updates = clips_updates;
}

void Model::remember() {
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    tensors_[t].before.clear();
    for (auto& array : tensors_[t].arrays) {
      array->download();
      tensors_[t].before.push_back(array->host);
    }
    steps_[t]->download();
    tensors_[t].updates_before = static_cast<float>(decode(steps_[t]->host.data(), DType::float32));
    tensors_[t].unit_factors = find_unit_factors(t);
  }
}

void Model::run(gradfast::cuda::Stepper& stepper, bool changed, Phase phase, cudaStream_t stream, const double* total) {
  give_scalars();
  stepper.run(problem_, changed, phase, total, stream);
}

void Model::step_and_check(gradfast::cuda::Stepper& stepper, bool changed, cudaStream_t stream) {
  remember();
  run_and_check(stepper, changed, false, stream);
}

void Model::run_and_check(gradfast::cuda::Stepper& stepper, bool changed, bool in_phases, cudaStream_t stream) {
  run(stepper, changed, in_phases ? Phase::measure : Phase::both, stream);
  if (in_phases) run(stepper, false, Phase::update, stream);
  require(cudaStreamSynchronize(stream), "the step");
  check_step(stepper);
}

double Model::join(double a, double b) const {
  if (norm.kind != NormKind::infinity) return a + b;
  return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b);
}

int Model::gradient_array(const Tensor& tensor) { return tensor.in_place ? kParameter : kGradient; }

double Model::clamped(const Tensor& tensor, std::int64_t element) const {
  const int array = gradient_array(tensor);
  const double g = value(tensor, array, element);
  double limit = clip.element_limit * loss_scale;
  if (tensor.dtypes[array] != DType::float64) limit = static_cast<float>(limit);
  return std::fabs(g) > limit ? std::copysign(limit, g) : g;
}

double Model::gradient(const Tensor& tensor, std::int64_t element) const {
  const double g = clamped(tensor, element);
  if (tensor.unit_factors.empty()) return g;
  const auto units = static_cast<std::int64_t>(tensor.unit_factors.size());
  return g * tensor.unit_factors[element / (tensor.elements / units)];
}

// Brock et al. 2021, equation 3, with eps: unit by unit.
std::vector<double> Model::find_unit_factors(std::size_t index) const {
  const Tensor& tensor = tensors_[index];
  const std::int64_t length = problem_.slots[index].row_length;
  std::vector<double> factors;
  for (std::int64_t first = 0; length > 0 && first < tensor.elements; first += length) {
    long double gradients = 0, weights = 0;
    for (std::int64_t e = first; e < first + length; ++e) {
      const double g = clamped(tensor, e) / loss_scale;
      const double w = value(tensor, tensor.in_place ? 1 : problem_.slots[index].weights, e);
      gradients += g * g;
      weights += w * w;
    }
    const double norm = std::sqrt(static_cast<double>(gradients));
    const double largest = clip.units.clipping * std::fmax(std::sqrt(static_cast<double>(weights)), clip.units.eps);
    factors.push_back(norm > largest ? largest / std::fmax(norm, 1e-6) : 1);
  }
  return factors;
}

double Model::sum_of(const Tensor& tensor) const {
  long double sum = 0;
  for (std::int64_t e = 0; e < tensor.elements; ++e) {
    const double g = gradient(tensor, e);
    if (norm.kind == NormKind::infinity) {
      sum = join(static_cast<double>(sum), std::fabs(g));
    } else {
      sum += norm.kind == NormKind::one   ? std::fabs(g)
             : norm.kind == NormKind::two ? g * g
                                          : std::pow(std::fabs(g), norm.p);
    }
  }
  return static_cast<double>(sum);
}

double Model::expected_sum() const {
  double sum = 0;
  for (const Tensor& tensor : tensors_) sum = join(sum, sum_of(tensor));
  return sum;
}

double Model::expected_update_sum(std::size_t index) const {
  const Tensor& tensor = tensors_[index];
  const gradfast::Group& group = problem_.groups[problem_.slots[index].group];
  const double beta2 = group.values.value[2], eps = group.values.value[3];
  long double sum = 0;
  for (std::int64_t e = 0; e < tensor.elements; ++e) {
    const double g = gradient(tensor, e) / loss_scale * clip_factors_[index];
    const double v = beta2 * value(tensor, kFirstState + 1, e) + (1 - beta2) * g * g;
    sum += g * g / std::fmax(v, eps * eps);
  }
  return static_cast<double>(sum) * (1 - std::pow(beta2, tensor.updates_before + 1.0));
}

double Model::expected_rate(std::size_t index) const {
  const int rule = problem_.groups[problem_.slots[index].group].rule;
  if (!clips_updates || (rule != kAdam && rule != kAmsgrad) || tensors_[index].elements == 0) return 1;
  return 1 / std::fmax(1, std::sqrt(expected_update_sum(index) / tensors_[index].elements));
}

Report Model::report(const gradfast::cuda::Stepper& stepper) const {
  Report report;
  require(cudaMemcpy(&report, stepper.report(), sizeof report, cudaMemcpyDeviceToHost), "the report");
  return report;
}

// Equal, both NaN, or close: squares of 16-bit gradients are added by fours in fp32.
static bool close(double a, double b, double relative) {
  return a == b || (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= relative * std::fabs(b);
}

void Model::check_report(const Report& report) {
  const double sum = expected_sum();
  const double root = norm.kind == NormKind::two       ? std::sqrt(sum)
                      : norm.kind == NormKind::general ? std::pow(sum, 1 / norm.p)
                                                       : sum;
  bool half_precision = false;
  for (const Tensor& tensor : tensors_) half_precision = half_precision || size_of(tensor.dtypes[kGradient]) == 2;
  const double relative = half_precision ? 1e-7 : 1e-13;
  check(close(report.sum, sum, relative), "sum " + std::to_string(report.sum) + " for " + std::to_string(sum));
  check(close(report.norm, root / loss_scale, relative), "norm " + std::to_string(report.norm));
  const double ratio = clip.max_norm / (root / loss_scale + 1e-6);
  const double coefficient = (std::isinf(clip.max_norm) || ratio > 1 ? 1 : ratio) * policy_coefficient;
  check(close(report.coefficient, coefficient, 10 * relative), "coefficient " + std::to_string(report.coefficient));
  const bool bad = found_infinite || (clip.nonfinite == gradfast::NonFinite::skip && !std::isfinite(root));
  const bool skip = bad || policy_skip;
  if (skip) ++skipped_steps;
  check(report.skipped == (skip ? 1 : 0), "skipped");
  check(report.skipped_steps == skipped_steps, "skipped_steps " + std::to_string(report.skipped_steps));
  std::int32_t first = -1;
  for (std::size_t t = tensors_.size(); t-- > 0 && !std::isfinite(sum);) {
    if (!std::isfinite(sum_of(tensors_[t]))) first = static_cast<std::int32_t>(t);
  }
  check(report.first_nonfinite == first, "first_nonfinite " + std::to_string(report.first_nonfinite));
}

void Model::check_tensor(std::size_t index, double scale, bool skipped) {
  Tensor& tensor = tensors_[index];
  const gradfast::Slot& slot = problem_.slots[index];
  const gradfast::Group& group = problem_.groups[slot.group];
  gradfast::PackedHyperparameters values = group.values;
  values.value[0] *= expected_rate(index);
  const bool updated = !skipped && group.rule >= 0;
  const int states = state_count(group.rule);
  const std::string name = "tensor " + std::to_string(index) + " (" + name_of(tensor.dtypes[kParameter]) + ", " +
                           std::to_string(tensor.elements) + " elements)";
  for (auto& array : tensor.arrays) array->download();
  std::vector<std::vector<std::byte>> rest = tensor.before;  // what must be there beside the updated elements
  int wrong = 0;
  std::string first_wrong;
  for (std::int64_t e = 0; updated && e < tensor.elements; ++e) {
    double state[3] = {};
    for (int s = 0; s < states; ++s) state[s] = value(tensor, kFirstState + s, e);
    const double p = value(tensor, kParameter, e);
    const Updated expected =
        update(group.rule, values.value, tensor.updates_before + 1.0, scale, p, gradient(tensor, e), state);
    for (int a = 0; a < kFirstState + states; ++a) {
      if (a == kGradient) continue;
      const Value& want = a == kParameter ? expected.parameter : expected.state[a - kFirstState];
      const std::byte* got = tensor.arrays[a]->host.data() + offset(tensor, a, e);
      const double stored = decode(got, tensor.dtypes[a]);
      // By chance, either neighbour will do: a whole unit of the last place.
      const double units = tensor.mixed && gradfast::is_by_chance(tensor.formats.array[a]) ? 2 : 1;
      const bool good = (std::isnan(stored) && std::isnan(want.exact)) || stored == want.exact ||
                        std::fabs(stored - want.exact) <= units * tolerance(want.exact, want.terms, tensor.dtypes[a]);
      if (!good && ++wrong == 1) {
        first_wrong = ": array " + std::to_string(a) + " element " + std::to_string(e) + " is " +
                      std::to_string(stored) + ", not " + std::to_string(want.exact);
      }
      std::copy_n(got, size_of(tensor.dtypes[a]), rest[a].data() + offset(tensor, a, e));
    }
    if (tensor.formats.has_copy) {  // exactly the master, rounded to nearest
      const int copy = kFirstState + states;
      const double master =
          decode(tensor.arrays[kParameter]->host.data() + offset(tensor, kParameter, e), DType::float32);
      encode(master, rest[copy].data() + offset(tensor, copy, e), tensor.dtypes[copy]);
    }
  }
  check(wrong == 0, name + ": " + std::to_string(wrong) + " wrong values" + first_wrong);
  for (std::size_t a = 0; a < tensor.arrays.size(); ++a) {
    check(tensor.arrays[a]->host == rest[a], name + ": array " + std::to_string(a) + " changed where it must not");
  }
  steps_[index]->download();
  const double updates = decode(steps_[index]->host.data(), DType::float32);
  check(updates == tensor.updates_before + (updated ? 1 : 0), name + ": step count " + std::to_string(updates));
}

void Model::check_step(gradfast::cuda::Stepper& stepper) {
  const Report now = report(stepper);
  check_report(now);
  std::vector<double> sums(tensors_.size());
  if (!sums.empty()) {
    require(cudaMemcpy(sums.data(), stepper.tensor_sums(), sums.size() * sizeof(double), cudaMemcpyDeviceToHost),
            "the tensors' sums");
  }
  clip_factors_.assign(tensors_.size(), now.coefficient);
  for (std::size_t t = 0; t < tensor_coefficients.size(); ++t) clip_factors_[t] *= tensor_coefficients[t];
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    const double relative = size_of(tensors_[t].dtypes[kGradient]) == 2 ? 1e-7 : 1e-13;
    check(close(sums[t], sum_of(tensors_[t]), relative), "sum of tensor " + std::to_string(t));
    check_tensor(t, clip_factors_[t] / loss_scale, now.skipped != 0);
  }
}

void Model::check_unchanged() {
  clip_factors_.assign(tensors_.size(), 1);
  for (std::size_t t = 0; t < tensors_.size(); ++t) check_tensor(t, 1, true);
}

std::vector<std::byte> Model::bytes() {
  std::vector<std::byte> all;
  for (Tensor& tensor : tensors_) {
    for (auto& array : tensor.arrays) {
      array->download();
      all.insert(all.end(), array->host.begin(), array->host.end());
    }
  }
  return all;
}

}  // namespace test

// torch.ops.gradfast.*: norm and clipping of lists of tensors, with fake kernels for torch.compile.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>

#include "binding/backend_pool.h"
#include "binding/rule_names.h"
#include "binding/slots.h"

namespace gradfast {
namespace {

using TensorList = std::vector<at::Tensor>;

std::string index_name(std::size_t index) { return "tensors[" + std::to_string(index) + "]"; }

// One problem a device: the tensors of a list, each both "parameter" and "gradient".
struct Part {
  explicit Part(at::Device on) : device(on), backend(on) {}

  at::Device device;
  TensorList tensors;
  std::vector<std::int64_t> indices;  // of `tensors` in the list
  Problem problem;
  BackendLease backend;
};

std::vector<Part> split_by_device(at::TensorList tensors, const Norm& norm, const char* rule = nullptr) {
  std::vector<Part> parts;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    check_tensor(tensor, "tensor", index_name(i), rule != nullptr);
    TORCH_CHECK_NOT_IMPLEMENTED(!tensor.is_complex() || norm.kind == NormKind::two,
                                "gradfast: a complex tensor needs norm_type=2: ", index_name(i));
    auto part = std::find_if(parts.begin(), parts.end(), [&](const Part& p) { return p.device == tensor.device(); });
    if (part == parts.end()) part = parts.emplace(parts.end(), tensor.device());
    // A lazy conjugate or negative needs no resolving: magnitudes and real factors are the same on what it views.
    part->tensors.push_back(tensor);
    part->indices.push_back(static_cast<std::int64_t>(i));
    add_slot({tensor, tensor}, nullptr, 0, index_name(i), &part->problem);
  }
  for (Part& part : parts) {
    Group group;
    group.rule = rule == nullptr ? -1 : rule_index(rule);
    part.problem.groups.push_back(group);
    part.problem.norm = norm;
    part.problem.clip.nonfinite = NonFinite::propagate;
  }
  return parts;
}

at::ScalarType norm_dtype(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    if (c10::toRealValueType(tensor.scalar_type()) == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

// Measures every part and joins the sums on the first part's device. 0-d double.
at::Tensor total_sum(std::vector<Part>& parts, const Norm& norm) {
  at::Tensor total;
  for (Part& part : parts) {
    part.backend->run(part.problem, true, Phase::measure, {});
    const at::Tensor sum = part.backend->sum();
    if (!total.defined()) {
      total = sum;
    } else {
      const at::Tensor moved = sum.to(total.device());
      total = norm.kind == NormKind::infinity ? at::maximum(total, moved) : at::add(total, moved);
    }
  }
  return total;
}

at::Tensor finish(const at::Tensor& sum, const Norm& norm) {
  switch (norm.kind) {
    case NormKind::two:
      return sum.sqrt();
    case NormKind::general:
      return sum.pow(1.0 / norm.p);
    default:
      return sum;
  }
}

at::Tensor norm_in_double(at::TensorList tensors, double norm_type) {
  const Norm norm = norm_of(norm_type);
  auto parts = split_by_device(tensors, norm);
  return finish(total_sum(parts, norm), norm);
}

at::Tensor total_norm(at::TensorList tensors, double norm_type) {
  if (tensors.empty()) return at::zeros({}, at::kFloat);
  return norm_in_double(tensors, norm_type).to(norm_dtype(tensors));
}

// One value a tensor, on the first one's device.
at::Tensor power_sums(at::TensorList tensors, double norm_type) {
  const Norm norm = norm_of(norm_type);
  auto parts = split_by_device(tensors, norm);
  const auto options = at::TensorOptions().dtype(at::kDouble);
  at::Tensor sums = at::zeros({static_cast<std::int64_t>(tensors.size())},
                              options.device(parts.empty() ? at::Device(at::kCPU) : parts[0].device));
  for (Part& part : parts) {
    part.backend->run(part.problem, true, Phase::measure, {});
    if (parts.size() == 1) return part.backend->tensor_sums();
    const at::Tensor indices = at::tensor(part.indices, at::TensorOptions().dtype(at::kLong).device(sums.device()));
    sums.index_copy_(0, indices, part.backend->tensor_sums().to(sums.device()));
  }
  return sums;
}

void clip_grads_with_norm_(at::TensorList gradients, double max_norm, const at::Tensor& norm) {
  // The finished norm goes in as the "largest magnitude" of the infinity norm, which finishing leaves as it is.
  auto parts = split_by_device(gradients, norm_of(2.0), "clip_gradient");
  for (Part& part : parts) {
    const at::Tensor total = norm.detach().to(part.device, at::kDouble).reshape({});
    // On the host the factor is known: a factor of one needs no pass at all.
    if (part.device.is_cpu() && clip_coefficient(max_norm, total.item<double>()) == 1.0) continue;
    part.problem.norm = norm_of(INFINITY);
    part.problem.clip.max_norm = max_norm;
    part.backend->run(part.problem, true, Phase::update, total);
    for (const at::Tensor& tensor : part.tensors) bump_version(tensor);
  }
}

at::Tensor clip_grad_norm_(at::TensorList gradients, double max_norm, double norm_type) {
  if (gradients.empty()) return at::zeros({}, at::kFloat);
  // Clipped by the norm as summed: rounded to float32 it may be infinite, and the factor zero.
  const at::Tensor norm = norm_in_double(gradients, norm_type);
  clip_grads_with_norm_(gradients, max_norm, norm);
  return norm.to(norm_dtype(gradients));
}

void clip_grad_value_(at::TensorList gradients, double clip_value) {
  for (std::size_t i = 0; i < gradients.size(); ++i) check_ordered(gradients[i], index_name(i));
  auto parts = split_by_device(gradients, norm_of(2.0), "clip_gradient");
  for (Part& part : parts) {
    part.problem.clip.element_limit = clip_value;
    const at::Tensor unused = at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(part.device));
    part.backend->run(part.problem, true, Phase::update, unused);
    for (const at::Tensor& tensor : part.tensors) bump_version(tensor);
  }
}

at::Tensor total_norm_fake(at::TensorList tensors, double) {
  if (tensors.empty()) return at::zeros({}, at::kFloat);
  return at::empty({}, tensors[0].options().dtype(norm_dtype(tensors)));
}

at::Tensor power_sums_fake(at::TensorList tensors, double) {
  const auto size = static_cast<std::int64_t>(tensors.size());
  const at::TensorOptions options = tensors.empty() ? at::TensorOptions() : tensors[0].options();
  return at::empty({size}, options.dtype(at::kDouble).memory_format(std::nullopt));
}

at::Tensor clip_grad_norm_fake(at::TensorList gradients, double, double norm_type) {
  return total_norm_fake(gradients, norm_type);
}

}  // namespace

TORCH_LIBRARY(gradfast, library) {
  library.def("total_norm(Tensor[] tensors, float norm_type) -> Tensor");
  library.def("power_sums(Tensor[] tensors, float norm_type) -> Tensor");
  library.def("clip_grads_with_norm_(Tensor(a!)[] grads, float max_norm, Tensor total_norm) -> ()");
  library.def("clip_grad_norm_(Tensor(a!)[] grads, float max_norm, float norm_type) -> Tensor");
  library.def("clip_grad_value_(Tensor(a!)[] grads, float clip_value) -> ()");
}

// For every device, since a backend is found for each tensor; and for an empty list, which is of no device.
TORCH_LIBRARY_IMPL(gradfast, CompositeExplicitAutograd, library) {
  library.impl("total_norm", &total_norm);
  library.impl("power_sums", &power_sums);
  library.impl("clip_grads_with_norm_", &clip_grads_with_norm_);
  library.impl("clip_grad_norm_", &clip_grad_norm_);
  library.impl("clip_grad_value_", &clip_grad_value_);
}

TORCH_LIBRARY_IMPL(gradfast, Meta, library) {
  library.impl("total_norm", &total_norm_fake);
  library.impl("power_sums", &power_sums_fake);
  library.impl("clip_grad_norm_", &clip_grad_norm_fake);
  library.impl("clip_grads_with_norm_", [](at::TensorList, double, const at::Tensor&) {});
  library.impl("clip_grad_value_", [](at::TensorList, double) {});
}

}  // namespace gradfast

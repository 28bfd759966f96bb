// A DTensor, which lies on the ranks of a device mesh, and the plain tensor of the elements that this rank holds of it.
// DTensor is a Python class: C++ sees a tensor without storage, and asks the Python object.
#pragma once

#include <ATen/core/Tensor.h>

namespace gradfast {

bool is_sharded(const at::Tensor& tensor);

// The elements on this rank. The Python lock must be held.
at::Tensor local_part(const at::Tensor& sharded);

}  // namespace gradfast

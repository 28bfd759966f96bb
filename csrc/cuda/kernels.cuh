// Instantiates the kernels of one storage type for every rule of the list.
#pragma once

#include "kernels.h"
#include "step.cuh"

namespace gradfast::cuda {

template <class Storage, class... Rule>
Kernels make_kernels(RuleList<Rule...>) {
  return Kernels{{Kernel{kernel_address<step_kernel<Rule, Storage, kSmallArguments>>(),
                         kernel_address<step_kernel<Rule, Storage, kLargeArguments>>()}...},
                 Kernel{kernel_address<measure_kernel<Storage, kSmallArguments>>(),
                        kernel_address<measure_kernel<Storage, kLargeArguments>>()}};
}

}  // namespace gradfast::cuda

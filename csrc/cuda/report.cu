#include "kernels.cuh"

const gradfast::cuda::Kernel& gradfast::cuda::report_kernels() {
  static const Kernel kernel{kernel_address<report_kernel<kSmallArguments>>(),
                             kernel_address<report_kernel<kLargeArguments>>()};
  return kernel;
}

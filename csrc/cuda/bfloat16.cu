#include "kernels.cuh"

const gradfast::cuda::Kernels& gradfast::cuda::bfloat16_kernels() {
  static const Kernels kernels = make_kernels<BFloat16>(Rules{});
  return kernels;
}

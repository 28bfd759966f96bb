#include "kernels.cuh"

const gradfast::cuda::Kernels& gradfast::cuda::float32_kernels() {
  static const Kernels kernels = make_kernels<float>(Rules{});
  return kernels;
}

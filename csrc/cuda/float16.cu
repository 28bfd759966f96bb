#include "kernels.cuh"

const gradfast::cuda::Kernels& gradfast::cuda::float16_kernels() {
  static const Kernels kernels = make_kernels<Half>(Rules{});
  return kernels;
}

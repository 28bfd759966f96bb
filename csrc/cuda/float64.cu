#include "kernels.cuh"

const gradfast::cuda::Kernels& gradfast::cuda::float64_kernels() {
  static const Kernels kernels = make_kernels<double>(Rules{});
  return kernels;
}

#include "kernels.cuh"

const gradfast::cuda::Kernels& gradfast::cuda::mixed_kernels() {
  static const Kernels kernels = make_kernels<Mixed>(Rules{});
  return kernels;
}

// One step over all tensors of one CUDA device: measure the global norm, decide the clip factor, update, in one
// cooperative launch where that is possible and in a few launches otherwise. Nothing here waits for the device.
//
// The caller hands in a Problem whose addresses are device addresses. Include this header from plain C++: it needs
// the CUDA runtime's header and nothing else.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "plan/problem.h"

namespace gradfast::cuda {

class Stepper {
 public:
  // Allocates the report on `device`. The addresses of report() never change; those of tensor_sums() may with every
  // run() that is given `changed`.
  explicit Stepper(int device);
  // Frees everything: CUDA graphs that captured a run() must not be replayed afterwards.
  ~Stepper();
  Stepper(const Stepper&) = delete;
  Stepper& operator=(const Stepper&) = delete;

  // Enqueues one step on `stream`, also while the stream is being captured into a graph.
  //   changed  the slots' number, sizes, dtypes, groups or layouts, or the groups' number or rules, differ from those
  //            of the last run (addresses, scalars, norm and clip settings may differ at any time)
  //   phase    measure: writes sum, norm, coefficient and first_nonfinite of the report, and the tensor sums.
  //            update: clips by `*total`, or by the report's own sum where total is null; counts a skipped step.
  //            both: one after the other.
  //            measure_updates: between the two, where updates are measured apart; writes their sums.
  //   total    device address of a sum of powers, for Phase::update and Phase::measure_updates; else null
  // Throws std::runtime_error with the name of the CUDA call that failed.
  void run(const Problem& problem, bool changed, Phase phase, const double* total, cudaStream_t stream);

  const Report* report() const;       // device address
  const double* tensor_sums() const;  // device address: sum of powers of each slot, in the order of Problem::slots
  const double* update_sums() const;  // likewise, of squared updates, after the phase that measured them alone
  int launches() const;               // kernels that the last run() launched

 private:
  class Implementation;
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace gradfast::cuda

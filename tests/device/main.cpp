// Tests of csrc/cuda. The same program runs under g++ with the simulator in shim/, where CI has no GPU, and compiled by
// nvcc on a GPU, where compute-sanitizer watches it.
#include <cstdio>

#include "cases.h"
#include "check.h"

int main() {
#if defined(GRADFAST_SHIM)
  test::run_shim_cases();
#endif
  test::run_step_cases();
  test::run_policy_cases();
  test::run_launch_cases();
  std::printf("%d passed, %d failed\n", test::passed, test::failed);
  return test::failed == 0 ? 0 : 1;
}

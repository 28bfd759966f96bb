// Tests of csrc/cuda. The same program runs under g++ with the simulator in shim/, where CI has no GPU, and compiled by
// nvcc on a GPU, where compute-sanitizer watches it. `device_test step launch` runs those parts alone.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "cases.h"
#include "check.h"

int main(int argc, char** argv) {
  const std::vector<std::string> asked(argv + 1, argv + argc);
  const auto wanted = [&](const char* part) {
    return asked.empty() || std::find(asked.begin(), asked.end(), part) != asked.end();
  };
#if defined(GRADFAST_SHIM)
  if (wanted("shim")) test::run_shim_cases();
#endif
  if (wanted("step")) test::run_step_cases();
  if (wanted("mixed")) test::run_mixed_cases();
  if (wanted("policy")) test::run_policy_cases();
  if (wanted("update_clipping")) test::run_update_clipping_cases();
  if (wanted("element_limit")) test::run_element_limit_cases();
  if (wanted("agc")) test::run_agc_cases();
  if (wanted("launch")) test::run_launch_cases();
  std::printf("%d passed, %d failed\n", test::passed, test::failed);
  return test::failed == 0 && test::passed > 0 ? 0 : 1;
}

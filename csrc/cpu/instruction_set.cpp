#include "cpu/instruction_set.h"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace gradfast::cpu {
namespace {

InstructionSet supported() {
#if GF_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

InstructionSet asked_for() {
  const char* variable = std::getenv("GRADFAST_CPU_CAPABILITY");
  const std::string value = variable == nullptr ? "" : variable;
  if (value == "default") return InstructionSet::baseline;
  if (value == "avx2") return InstructionSet::avx2;
  return InstructionSet::avx512;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = std::min(supported(), asked_for());
  return chosen;
}

const char* name(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace gradfast::cpu

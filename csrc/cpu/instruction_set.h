// Run-time choice of instruction set: one build serves every x86-64 machine.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define GF_X86 1
#define GF_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define GF_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")))
#else
#define GF_X86 0
#define GF_TARGET_AVX2
#define GF_TARGET_AVX512
#endif

namespace gradfast::cpu {

enum class InstructionSet : int { baseline, avx2, avx512 };

// The best that this machine has, or less if GRADFAST_CPU_CAPABILITY (default, avx2, avx512) asks for less. Read once.
InstructionSet instruction_set();

const char* name(InstructionSet set);

// `Loop` offers the same static function compiled three times: baseline, avx2 and avx512.
template <class Loop>
auto best_of() {
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return &Loop::avx512;
    case InstructionSet::avx2:
      return &Loop::avx2;
    default:
      return &Loop::baseline;
  }
}

}  // namespace gradfast::cpu

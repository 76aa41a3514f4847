#include "isa.h"

#include <algorithm>
#include <atomic>

namespace usaf::cpu {
namespace {

Isa detect() {
#ifdef USAF_HAS_ISA_LEVELS
  // What the levels x86-64-v4 and -v3 are made of, and kernels use.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") &&
                    __builtin_cpu_supports("movbe");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? Isa::avx512 : Isa::avx2;
#endif
  return Isa::plain;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{detected_isa()};
  return value;
}

}  // namespace

Isa detected_isa() {
  static const Isa value = detect();
  return value;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

void limit_isa(Isa limit) { current().store(std::min(limit, detected_isa()), std::memory_order_relaxed); }

}  // namespace usaf::cpu

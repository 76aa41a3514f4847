// Which instruction set the hand-vectorised kernels use: chosen at run time, so that one binary serves every CPU. All
// paths give the same bits.
#pragma once

// On a function: compile it for this level. Its loops vectorise with what the level has, and intrinsics of it may stand
// in it. Elsewhere than on x86-64 there is the plain path only.
#if defined(__x86_64__) && defined(__GNUC__)
#define USAF_HAS_ISA_LEVELS 1
#define USAF_AVX2 __attribute__((target("arch=x86-64-v3")))
#define USAF_AVX512 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#endif

namespace usaf::cpu {

enum class Isa : int { plain = 0, avx2 = 1, avx512 = 2 };
inline constexpr int kNumIsas = 3;
inline constexpr const char* kIsaNames[kNumIsas] = {"plain", "avx2", "avx512"};

// The best one that this CPU has.
Isa detected_isa();
// The one in use: the detected one, or less after limit_isa.
Isa isa();
// At most `limit` from now on, in every thread. For tests and measurements.
void limit_isa(Isa limit);

}  // namespace usaf::cpu

// What the numerics need to compile as host C++, CUDA and HIP alike.
//
// Everything under cpp/numerics/ takes values and returns values: no torch, no threads, no global memory. It must be
// compiled with floating-point contraction off (-ffp-contract=off, -fmad=false): backends agree bit for bit.
#pragma once

// clang knows memcpy and sqrt of the device only once it has seen this.
#if defined(__HIPCC__)
#include <hip/hip_runtime.h>
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define USAF_HD __host__ __device__ inline __attribute__((always_inline))
#else
#define USAF_HD inline
#endif

// USAF_OPAQUE(value): code for AMD GPUs that is compiled without knowing where a lane's variable comes from, so that
// nothing before and after is merged. No instruction; nothing elsewhere.
#if defined(__HIP_DEVICE_COMPILE__)
#define USAF_OPAQUE(value) asm("" : "+v"(value))
#else
#define USAF_OPAQUE(value) static_cast<void>(value)
#endif

// Test-only: with this header first on the include path, nvcc compiles hip/*.hip unchanged (`nvcc -x cu`), so that they
// can run on an NVIDIA GPU. It shows their logic, not what the AMD compiler makes of them. A wave is 32 lanes there.
// Only what our sources use stands here.
#pragma once
#include <cuda_runtime.h>

using hipError_t = cudaError_t;
using hipStream_t = cudaStream_t;
inline constexpr hipError_t hipSuccess = cudaSuccess;
inline hipError_t hipGetLastError() { return cudaGetLastError(); }
inline const char* hipGetErrorString(hipError_t error) { return cudaGetErrorString(error); }

inline constexpr cudaDeviceAttr hipDeviceAttributeMultiprocessorCount = cudaDevAttrMultiProcessorCount;
inline hipError_t hipGetDevice(int* device) { return cudaGetDevice(device); }
inline hipError_t hipDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return cudaDeviceGetAttribute(value, attribute, device);
}

#define hipLaunchKernelGGL(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)

// HIP's collectives name no lanes: all that are there take part. Our sources call them with whole waves.
template <class T>
__device__ __forceinline__ T __shfl_xor(T value, int bits, int width = 32) {
  return __shfl_xor_sync(0xffffffffu, value, bits, width);
}
template <class T>
__device__ __forceinline__ T __shfl(T value, int source, int width = 32) {
  return __shfl_sync(0xffffffffu, value, source, width);
}
template <class T>
__device__ __forceinline__ T __shfl_up(T value, unsigned delta, int width = 32) {
  return __shfl_up_sync(0xffffffffu, value, delta, width);
}
// A macro: nvcc declares its own __ballot, of an older time.
#define __ballot(predicate) static_cast<unsigned long long>(__ballot_sync(0xffffffffu, predicate))

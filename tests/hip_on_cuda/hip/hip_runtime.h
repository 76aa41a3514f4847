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

// The runtime's part, for device.hip.
using hipEvent_t = cudaEvent_t;
inline constexpr hipError_t hipErrorNotReady = cudaErrorNotReady;
inline constexpr cudaMemcpyKind hipMemcpyDefault = cudaMemcpyDefault;
inline constexpr unsigned hipStreamNonBlocking = cudaStreamNonBlocking, hipEventDisableTiming = cudaEventDisableTiming,
                          hipHostRegisterPortable = cudaHostRegisterPortable;
inline hipError_t hipGetDeviceCount(int* count) { return cudaGetDeviceCount(count); }
inline hipError_t hipSetDevice(int device) { return cudaSetDevice(device); }
inline hipError_t hipMemGetInfo(size_t* free, size_t* total) { return cudaMemGetInfo(free, total); }
inline hipError_t hipStreamCreateWithFlags(hipStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithFlags(stream, flags);
}
inline hipError_t hipStreamDestroy(hipStream_t stream) { return cudaStreamDestroy(stream); }
inline hipError_t hipEventCreateWithFlags(hipEvent_t* event, unsigned flags) {
  return cudaEventCreateWithFlags(event, flags);
}
inline hipError_t hipEventDestroy(hipEvent_t event) { return cudaEventDestroy(event); }
inline hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream) { return cudaEventRecord(event, stream); }
inline hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned flags) {
  return cudaStreamWaitEvent(stream, event, flags);
}
inline hipError_t hipEventQuery(hipEvent_t event) { return cudaEventQuery(event); }
inline hipError_t hipEventSynchronize(hipEvent_t event) { return cudaEventSynchronize(event); }
inline hipError_t hipMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind, hipStream_t stream) {
  return cudaMemcpyAsync(dst, src, bytes, kind, stream);
}
inline hipError_t hipHostRegister(void* pointer, size_t bytes, unsigned flags) {
  return cudaHostRegister(pointer, bytes, flags);
}
inline hipError_t hipHostUnregister(void* pointer) { return cudaHostUnregister(pointer); }

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

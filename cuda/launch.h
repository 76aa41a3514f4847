// How the CUDA sources launch a kernel: always on the caller's stream, always checked.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "errors.h"

// tests/gpu_emulation defines its own, to run the kernels on the CPU.
#ifndef USAF_LAUNCH_KERNEL
#define USAF_LAUNCH_KERNEL(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#endif

// The limit of gridDim.y; the emulation tests lower it, so that kernels loop over the rest.
#ifndef USAF_MAX_GRID_Y
#define USAF_MAX_GRID_Y 65535
#endif

namespace usaf::gpu {

inline constexpr int64_t kMaxGridY = USAF_MAX_GRID_Y;

// `name` says in the message which kernel failed. Kernels take their arguments by value.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
            const Arguments&... arguments) {
  USAF_LAUNCH_KERNEL(kernel, grid, block, 0, static_cast<cudaStream_t>(stream), arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw DeviceError(std::string(name) + ": CUDA launch failed: " + cudaGetErrorString(error));
}

// Of the current device, for grids that fill it once and loop.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) throw DeviceError(std::string("CUDA device: ") + cudaGetErrorString(error));
  return count;
}

}  // namespace usaf::gpu

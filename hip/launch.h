// How the HIP sources launch a kernel: always on the caller's stream, always checked.
#pragma once
#include <hip/hip_runtime.h>

#include <cstdint>
#include <string>

#include "errors.h"

// The limit of gridDim.y; the emulation tests lower it, so that kernels loop over the rest.
#ifndef USAF_MAX_GRID_Y
#define USAF_MAX_GRID_Y 65535
#endif

namespace usaf::gpu {

inline constexpr int64_t kMaxGridY = USAF_MAX_GRID_Y;

// `name` says in the message which kernel failed: from HIP 7.0 on the last error stays until it is taken, so what an
// earlier call left is taken first. If the device is lost, the launch has that error too. Kernels take their arguments
// by value.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
            const Arguments&... arguments) {
  static_cast<void>(hipGetLastError());
  hipLaunchKernelGGL(kernel, grid, block, 0, static_cast<hipStream_t>(stream), arguments...);
  const hipError_t error = hipGetLastError();
  if (error != hipSuccess) throw DeviceError(std::string(name) + ": HIP launch failed: " + hipGetErrorString(error));
}

// Of the current device, for grids that fill it once and loop. On RDNA the runtime counts pairs of compute units.
inline int multiprocessors() {
  int device = 0, count = 0;
  hipError_t error = hipGetDevice(&device);
  if (error == hipSuccess) error = hipDeviceGetAttribute(&count, hipDeviceAttributeMultiprocessorCount, device);
  if (error != hipSuccess) throw DeviceError(std::string("HIP device: ") + hipGetErrorString(error));
  return count;
}

}  // namespace usaf::gpu

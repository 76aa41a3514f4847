// How the HIP sources launch a kernel: always on the caller's stream, always checked.
#pragma once
#include <hip/hip_runtime.h>

#include <string>

#include "errors.h"

namespace usaf::gpu {

// `name` says in the message which kernel failed. Kernels take their arguments by value.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
            const Arguments&... arguments) {
  hipLaunchKernelGGL(kernel, grid, block, 0, static_cast<hipStream_t>(stream), arguments...);
  const hipError_t error = hipGetLastError();
  if (error != hipSuccess) throw DeviceError(std::string(name) + ": HIP launch failed: " + hipGetErrorString(error));
}

}  // namespace usaf::gpu

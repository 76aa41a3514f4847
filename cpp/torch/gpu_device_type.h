// Torch's name of the devices that the GPU kernels run on. No torch in this header.
#pragma once
#include <string>

namespace usaf {

std::string gpu_device_type();  // "cuda", with ROCm too; in a build with GPU kernels

}  // namespace usaf

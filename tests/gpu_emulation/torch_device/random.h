// Test-only: the fake GPU's random numbers.
#pragma once
#include <ATen/core/Generator.h>

namespace fake_gpu {

// What the device's random ops draw from unless they are given a generator of the device.
const at::Generator& default_generator();
// The CPU generator inside a generator of the device.
at::Generator inner_generator(const at::Generator& generator);

}  // namespace fake_gpu

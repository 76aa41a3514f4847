// Test-only: memory of the fake GPU. It is host memory, so that the emulated kernels and torch's CPU kernels can use
// it.
#pragma once
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>

namespace fake_gpu {

inline const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);

// Fresh memory is all ones, which is NaN in every float type: what a kernel should have written and did not shows.
c10::DeviceAllocator* device_allocator();
// Of host memory that counts as pinned.
c10::Allocator* pinned_allocator();
bool is_pinned(const void* pointer);

// The memory of a host storage as device memory that keeps the storage alive.
c10::DataPtr adopt(c10::Storage host);

}  // namespace fake_gpu

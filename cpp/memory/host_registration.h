// Host memory registered with a device: pinned, so that copies from it run beside computation.
//
// In slabs, each registered by itself, so that where the system or the driver sets a limit, what is below it is pinned
// all the same. The rest is pageable: copies from it are right, but slow, and the host waits for them.
//
// Two things must not happen to registered memory. Its protection must not change: amdgpu would stop the queues, find
// the memory read-only where it asks for writing, and try again for ever. And a fork() must not share it: a driver's
// pages are copied for the child at once, all of them, or driven out. So children do not get it.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "../device_api.h"

namespace usaf {

inline constexpr int64_t kRegisteredSlabBytes = int64_t{1} << 30;

class HostRegistration {
 public:
  HostRegistration() = default;
  // `base`: page-aligned. Slabs of about slab_bytes, each a multiple of `unit`, so that no unit lies in two. Memory
  // that the device refuses is no error.
  HostRegistration(std::shared_ptr<Device> device, uint8_t* base, int64_t bytes, int64_t unit,
                   int64_t slab_bytes = kRegisteredSlabBytes);
  ~HostRegistration() { release(); }
  HostRegistration(HostRegistration&& other) noexcept { *this = std::move(other); }
  HostRegistration& operator=(HostRegistration&& other) noexcept;

  int64_t bytes() const { return bytes_; }                 // registered, from the base on
  const std::string& failure() const { return failure_; }  // why not more, or empty

  // In a child of fork() none of it is there, and its owner must not unmap it.
  bool is_left_behind() const { return bytes_ > 0 && device_->is_left_behind(); }

  // No copy may be under way.
  void release() noexcept;

 private:
  std::shared_ptr<Device> device_;
  uint8_t* base_ = nullptr;
  int64_t slab_bytes_ = 0, bytes_ = 0;
  std::string failure_;
};

}  // namespace usaf

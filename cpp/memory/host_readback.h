// A little registered host memory through which results of a device come back, and the event to wait for.
#pragma once
#include <cstdint>
#include <memory>

#include "../device_api.h"
#include "host_registration.h"

namespace usaf {

class HostReadback {
 public:
  explicit HostReadback(std::shared_ptr<Device> device);
  ~HostReadback();
  HostReadback(const HostReadback&) = delete;
  HostReadback& operator=(const HostReadback&) = delete;

  // Room for `bytes`; what was there is lost. Throws DeviceError when it cannot be had.
  void reserve(int64_t bytes);
  // Queue a copy of device memory to [offset, offset + bytes) of the room.
  void copy(int64_t offset, const void* source, int64_t bytes, Device::Stream stream);
  // Queue the end of the copies, and wait for it: one host wait.
  void finish(Device::Stream stream);
  const uint8_t* wait();

 private:
  void free_memory() noexcept;

  std::shared_ptr<Device> device_;
  Device::Event done_ = nullptr;
  uint8_t* base_ = nullptr;
  int64_t bytes_ = 0;
  HostRegistration registration_;
};

}  // namespace usaf

#include "host_readback.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "../errors.h"
#include "page_layout.h"

namespace usaf {

HostReadback::HostReadback(std::shared_ptr<Device> device)
    : device_(std::move(device)), done_(device_->create_event()) {}

HostReadback::~HostReadback() {
  if (device_->is_left_behind()) return;
  try {
    device_->synchronize(done_);  // after an exception a copy may be under way
  } catch (const DeviceError&) {
  }
  free_memory();
  device_->destroy_event(done_);
}

void HostReadback::free_memory() noexcept {
  registration_.release();
  if (base_ != nullptr) munmap(base_, static_cast<size_t>(bytes_));
  base_ = nullptr;
  bytes_ = 0;
}

void HostReadback::reserve(int64_t bytes) {
  if (bytes <= bytes_) return;
  if (base_ != nullptr) wait();
  free_memory();
  const int64_t size = round_up(bytes, kPageAlign);
  void* mapping = mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) {
    throw DeviceError("cannot map " + std::to_string(size) + " bytes for a device's results: " + std::strerror(errno));
  }
  base_ = static_cast<uint8_t*>(mapping);
  bytes_ = size;
  registration_ = HostRegistration(device_, base_, size, kPageAlign);  // pageable will do
}

void HostReadback::copy(int64_t offset, const void* source, int64_t bytes, Device::Stream stream) {
  device_->copy_async(base_ + offset, source, bytes, stream);
}

void HostReadback::finish(Device::Stream stream) { device_->record(done_, stream); }

const uint8_t* HostReadback::wait() {
  device_->synchronize(done_);
  return base_;
}

}  // namespace usaf

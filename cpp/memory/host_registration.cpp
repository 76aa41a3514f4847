#include "host_registration.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "../errors.h"

namespace usaf {

HostRegistration::HostRegistration(std::shared_ptr<Device> device, uint8_t* base, int64_t bytes, int64_t unit,
                                   int64_t slab_bytes)
    : device_(std::move(device)), base_(base), slab_bytes_(std::max<int64_t>(1, slab_bytes / unit) * unit) {
  try {
    while (bytes_ < bytes) {
      const int64_t slab = std::min(slab_bytes_, bytes - bytes_);
      device_->register_host(base_ + bytes_, static_cast<size_t>(slab));
      bytes_ += slab;
    }
  } catch (const DeviceError& error) {
    failure_ = error.what();
  }
  if (bytes_ > 0) madvise(base_, static_cast<size_t>(bytes_), MADV_DONTFORK);  // refused, a fork is slow, but right
}

HostRegistration& HostRegistration::operator=(HostRegistration&& other) noexcept {
  if (this == &other) return *this;
  release();
  device_ = std::move(other.device_);
  base_ = std::exchange(other.base_, nullptr);
  slab_bytes_ = other.slab_bytes_;
  bytes_ = std::exchange(other.bytes_, 0);
  failure_ = std::move(other.failure_);
  return *this;
}

void HostRegistration::release() noexcept {
  if (bytes_ > 0 && !device_->is_left_behind()) {
    for (int64_t start = 0; start < bytes_; start += slab_bytes_) device_->unregister_host(base_ + start);
    madvise(base_, static_cast<size_t>(bytes_), MADV_DOFORK);
  }
  bytes_ = 0;
}

}  // namespace usaf

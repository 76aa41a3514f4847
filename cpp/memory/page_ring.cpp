#include "page_ring.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>

#include "../errors.h"

namespace usaf {

PageRing::PageRing(std::shared_ptr<Device> device, int64_t num_pages, int64_t page_bytes, int64_t num_buffers)
    : device_(std::move(device)),
      page_bytes_(page_bytes),
      num_active_(num_buffers),
      buffers_(static_cast<size_t>(num_buffers)),
      buffer_of_page_(static_cast<size_t>(num_pages), -1) {
  const size_t bytes = static_cast<size_t>(num_buffers * page_bytes);
  void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    throw StoreError("cannot map " + std::to_string(bytes) + " bytes to read pages to: " + std::strerror(errno));
  }
  base_ = static_cast<uint8_t*>(mapping);
  try {
    registration_ = HostRegistration(device_, base_, num_buffers * page_bytes, page_bytes);
    for (Buffer& buffer : buffers_) buffer.copy = device_->create_event();
  } catch (...) {
    destroy();
    throw;
  }
}

PageRing::~PageRing() {
  try {
    wait_for_copies();
  } catch (const DeviceError&) {  // nothing more can be waited for
  }
  destroy();
}

void PageRing::destroy() noexcept {
  for (Buffer& buffer : buffers_) {
    if (buffer.copy) device_->destroy_event(buffer.copy);
  }
  registration_.release();
  munmap(base_, buffers_.size() * static_cast<size_t>(page_bytes_));
}

void PageRing::wait_for_copies() {
  for (Buffer& buffer : buffers_) {
    if (buffer.copying) device_->synchronize(buffer.copy);
    buffer.copying = false;
  }
}

bool PageRing::is_unused(int64_t page) const {
  const int64_t index = find(page);
  return index >= 0 && !buffers_[static_cast<size_t>(index)].copied;
}

const uint8_t* PageRing::ready(int64_t page) const {
  const int64_t index = find(page);
  return index < 0 || buffers_[static_cast<size_t>(index)].reading ? nullptr : address(index);
}

bool PageRing::is_copying(Buffer& buffer) {
  if (buffer.copying) buffer.copying = !device_->query(buffer.copy);
  return buffer.copying;
}

void PageRing::forget(Buffer& buffer) {
  if (buffer.page >= 0) buffer_of_page_[static_cast<size_t>(buffer.page)] = -1;
  buffer.page = -1;
}

std::optional<PageRead> PageRing::take(int64_t page, int64_t use, const NextUse& next_use) {
  // The larger, the better; a free buffer is the best.
  using Worth = std::tuple<bool, bool, bool, int64_t>;
  int64_t best = -1;
  Worth best_worth{};
  for (int64_t i = 0; i < num_active_; ++i) {
    Buffer& buffer = buffers_[static_cast<size_t>(i)];
    if (buffer.reading) continue;
    const bool free = buffer.page < 0;
    const int64_t held_use = free ? 0 : next_use(buffer.page);
    if (!free && held_use <= use) continue;
    const Worth worth{free, held_use >= 0, !is_copying(buffer), held_use};
    if (best < 0 || worth > best_worth) best = i, best_worth = worth;
  }
  if (best < 0) return std::nullopt;
  Buffer& buffer = buffers_[static_cast<size_t>(best)];
  const bool copying = is_copying(buffer);
  forget(buffer);
  buffer.page = page;
  buffer.reading = true;
  buffer.copied = false;
  buffer_of_page_[static_cast<size_t>(page)] = best;
  ++num_reading_;
  return PageRead{best, page, address(best), copying ? buffer.copy : nullptr};
}

int64_t PageRing::finish(int64_t buffer_index, bool succeeded) {
  Buffer& buffer = buffers_[static_cast<size_t>(buffer_index)];
  const int64_t page = buffer.page;
  buffer.reading = false;
  --num_reading_;
  if (succeeded) {
    buffer.copying = false;  // the read began behind the copy
  } else {
    forget(buffer);
  }
  return page;
}

void PageRing::record_copy(int64_t page, Device::Stream stream) {
  Buffer& buffer = buffers_[static_cast<size_t>(find(page))];
  device_->record(buffer.copy, stream);
  buffer.copied = buffer.copying = true;
}

void PageRing::resize(int64_t num_buffers) {
  wait_for_copies();
  for (size_t i = static_cast<size_t>(num_buffers); i < buffers_.size(); ++i) forget(buffers_[i]);
  const size_t kept = static_cast<size_t>(num_buffers * page_bytes_);
  const size_t all = buffers_.size() * static_cast<size_t>(page_bytes_);
  registration_.release();
  if (kept < all && madvise(base_ + kept, all - kept, MADV_DONTNEED) != 0) {
    throw StoreError(std::string("cannot give memory back: ") + std::strerror(errno));
  }
  num_active_ = num_buffers;
  registration_ = HostRegistration(device_, base_, num_buffers * page_bytes_, page_bytes_);
}

}  // namespace usaf

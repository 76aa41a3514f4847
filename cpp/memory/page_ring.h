// Host buffers between the disk and the device: pages read ahead, and with buffers to spare a cache. Knows buffers and
// what may be overwritten; when to read what is the pager's (pager_state.h), whose mutex guards every call.
//
// A buffer is free, being read, or holds a page. It is taken for another page only if it is not being read, and the
// read then begins behind the latest copy out of it.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "../device_api.h"
#include "host_registration.h"
#include "page_reader.h"

namespace usaf {

class PageRing {
 public:
  // Maps num_buffers * page_bytes of pageable memory (touched only when read to) and registers it with `device`,
  // as far as that goes.
  // Throws StoreError when the memory cannot be mapped.
  PageRing(std::shared_ptr<Device> device, int64_t num_pages, int64_t page_bytes, int64_t num_buffers);
  ~PageRing();  // no read may be under way
  PageRing(const PageRing&) = delete;
  PageRing& operator=(const PageRing&) = delete;

  int64_t num_buffers() const { return num_active_; }
  int64_t max_buffers() const { return static_cast<int64_t>(buffers_.size()); }
  const HostRegistration& registration() const { return registration_; }
  bool holds(int64_t page) const { return find(page) >= 0; }  // read, or being read
  bool is_unused(int64_t page) const;                         // held, but no copy was made of it yet
  const uint8_t* ready(int64_t page) const;                   // where it was read to, or null
  bool reading() const { return num_reading_ > 0; }           // is any read under way?

  // When a page in the ring is used next: the later, the better to overwrite. Below 0: asked for already.
  using NextUse = std::function<int64_t(int64_t page)>;
  // A buffer for `page`, whose own next use is `use`: a free one, or else that of a page used later. Pages that are
  // asked for go last, and before them those whose copy is still under way. Nothing if there is none.
  std::optional<PageRead> take(int64_t page, int64_t use, const NextUse& next_use);
  // The read is over; returns its page.
  int64_t finish(int64_t buffer_index, bool succeeded);

  // A copy out of the page's buffer was queued on `stream`. Its failure must have been taken by an earlier record: to
  // the ring an event that cannot be waited for is a copy that may still run.
  void record_copy(int64_t page, Device::Stream stream);

  // Use only the first `num_buffers`, at most max_buffers(), and give the memory of the others back.
  // No read may be under way; waits for copies. Throws, with nothing changed, when that fails.
  void resize(int64_t num_buffers);

 private:
  struct Buffer {
    int64_t page = -1;  // or -1
    bool reading = false;
    bool copied = false;           // since it was read
    bool copying = false;          // as far as known
    Device::Event copy = nullptr;  // of its latest copy
  };

  int64_t find(int64_t page) const { return buffer_of_page_[static_cast<size_t>(page)]; }
  uint8_t* address(int64_t index) const { return base_ + index * page_bytes_; }
  bool is_copying(Buffer& buffer);
  void forget(Buffer& buffer);
  void wait_for_copies();
  void destroy() noexcept;

  std::shared_ptr<Device> device_;
  int64_t page_bytes_, num_active_, num_reading_ = 0;
  uint8_t* base_ = nullptr;
  HostRegistration registration_;
  std::vector<Buffer> buffers_;
  std::vector<int64_t> buffer_of_page_;  // or -1
};

}  // namespace usaf

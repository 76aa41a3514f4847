// The host side of the experts: one page per (layer, expert), in one of two tiers.
//
// Memory: in our own mapping, filled once, then read-only, but for what is registered with a device, whose protection
// must not change (host_registration.h). The mapping is anonymous and page-aligned (not torch's: its
// pinned allocator rounds up to a power of two; not a mapped file: a truncated one would be a SIGBUS).
// Disk: in the store's files, read a page at a time (page_files.h).
// Writing files, and reading what stands around the pages, is Python's (usaf_ext/store.py).
#pragma once
#include <cstdint>
#include <memory>
#include <optional>

#include "host_registration.h"
#include "page_files.h"
#include "page_layout.h"

namespace usaf {

class ExpertStore {
 public:
  // In memory, to be filled. Throws std::invalid_argument for sizes below 1, StoreError when it cannot be mapped.
  ExpertStore(int64_t num_layers, int64_t num_experts, const PageLayout& layout);
  // On disk, sealed: `files` has the pages in the order of (layer, expert). Throws std::invalid_argument for sizes
  // below 1 and for another number of pages.
  ExpertStore(int64_t num_layers, int64_t num_experts, const PageLayout& layout, std::unique_ptr<PageFiles> files);
  ~ExpertStore();
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;

  int64_t num_layers() const { return num_layers_; }
  int64_t num_experts() const { return num_experts_; }
  const PageLayout& layout() const { return layout_; }
  int64_t bytes() const { return num_layers_ * num_experts_ * layout_.page_bytes; }

  bool on_disk() const { return files_ != nullptr; }
  const PageFiles* files() const { return files_.get(); }  // null in memory

  const uint8_t* page(int64_t layer, int64_t expert) const;  // StoreError when out of range, or on disk
  uint8_t* writable_page(int64_t layer, int64_t expert);     // StoreError once sealed
  void seal();                                               // no more writes (mprotect: a stray one faults)
  bool sealed() const { return sealed_; }

  // Read a page of a store on disk to `buffer`: page_bytes of room, aligned to kPageAlign. From any thread. Throws
  // StoreError naming file and page when it cannot be read.
  void read_page(int64_t layer, int64_t expert, uint8_t* buffer) const;

  // Register the pages with a device for asynchronous copies, once for all devices; undone in the destructor. A child
  // of fork() has no pages that are registered.
  const HostRegistration& register_with(std::shared_ptr<Device> device);

 private:
  int64_t page_number(int64_t layer, int64_t expert) const;  // StoreError when out of range
  void protect(int64_t from, int access) const;              // the pages from that byte on

  int64_t num_layers_, num_experts_;
  PageLayout layout_;
  std::unique_ptr<PageFiles> files_;
  uint8_t* base_ = nullptr;  // null on disk
  bool sealed_ = false;
  std::optional<HostRegistration> registration_;
};

}  // namespace usaf

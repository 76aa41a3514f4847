// The host side of the experts: one page per (layer, expert) in our own mapping, filled once, then read-only.
//
// The mapping is anonymous and page-aligned (not torch's: its pinned allocator rounds up to a power of two; not a
// mapped file: a truncated one would be a SIGBUS). Reading and writing files is Python's (usaf_ext/store.py).
#pragma once
#include <cstdint>
#include <memory>

#include "../device_api.h"
#include "page_layout.h"

namespace usaf {

class ExpertStore {
 public:
  // Throws std::invalid_argument for sizes below 1, StoreError when the memory cannot be mapped.
  ExpertStore(int64_t num_layers, int64_t num_experts, const PageLayout& layout);
  ~ExpertStore();
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;

  int64_t num_layers() const { return num_layers_; }
  int64_t num_experts() const { return num_experts_; }
  const PageLayout& layout() const { return layout_; }
  int64_t bytes() const { return num_layers_ * num_experts_ * layout_.page_bytes; }

  const uint8_t* page(int64_t layer, int64_t expert) const;  // StoreError when out of range
  uint8_t* writable_page(int64_t layer, int64_t expert);     // StoreError once sealed
  void seal();                                               // from now on read-only (mprotect): a stray write faults
  bool sealed() const { return sealed_; }

  // Register the mapping with a device for asynchronous copies (a no-op on the CPU); undone in the destructor.
  void register_with(std::shared_ptr<Device> device);

 private:
  int64_t num_layers_, num_experts_;
  PageLayout layout_;
  uint8_t* base_ = nullptr;
  bool sealed_ = false;
  std::shared_ptr<Device> registered_;
};

}  // namespace usaf

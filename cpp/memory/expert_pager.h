// The device side of the experts: N equal slots in a slab that the caller owns, filled from an ExpertStore by
// asynchronous copies on a copy-in stream. A state machine over device_api.h; no torch, no kernels.
//
// Use, for each sweep over a layer:   tickets = prefetch(layer, experts, phase)
//                                     for t in tickets:  wait(t);  compute with slot_of(t, i);  release(t)
// The order of use is known (layers up, then down, then up again), so the page to evict is the one whose next use is
// farthest (Belady). A slot is refilled only behind the compute stream's release event.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "../device_api.h"
#include "expert_store.h"

namespace usaf {

// What the sweep is for; it decides when a page is used next.
enum class Phase : int32_t {
  inference = 0,         // layers up, then up again
  training_forward = 1,  // layers up, then down
  backward = 2,          // layers down, then up
};

struct PagerStats {
  int64_t page_hits = 0, page_misses = 0;
  int64_t bytes_in = 0;      // host to device
  int64_t bytes_out = 0;     // device to host (0: slots are never dirty)
  double stall_seconds = 0;  // host time spent inside wait()
};

class ExpertPager {
 public:
  using Ticket = int64_t;  // unique for the pager's life: a generation, never reused

  // `slab`: num_slots * store->layout().page_bytes bytes on the device, owned by the caller, 64-byte aligned.
  // Throws BudgetError with fewer than two slots.
  ExpertPager(std::shared_ptr<Device> device, std::shared_ptr<const ExpertStore> store, void* slab, int64_t num_slots);
  ~ExpertPager();  // waits for copies in flight
  ExpertPager(const ExpertPager&) = delete;
  ExpertPager& operator=(const ExpertPager&) = delete;

  const ExpertStore& store() const { return *store_; }
  Device& device() { return *device_; }
  int64_t num_slots() const { return num_slots_; }
  int64_t max_group() const { return num_slots_ / 2; }

  // Queue `experts` (ascending, distinct) of `layer`; one ticket for each group of at most max_group() of them, in
  // order. Starts every copy that a free slot allows; the rest start in later calls. Never blocks.
  // Throws std::invalid_argument for a layer or expert out of range or an unsorted list.
  std::vector<Ticket> prefetch(int64_t layer, const std::vector<int64_t>& experts, Phase phase);

  const std::vector<int64_t>& experts_of(Ticket ticket) const;

  // Make `compute_stream` wait for the group's copies. First blocks (bounded by timeout_seconds, a failed copy
  // rethrown) until the copies are enqueued. Error (naming what to release) if the group needs a slot that an earlier,
  // unreleased ticket holds, and for a ticket already released or unknown.
  void wait(Ticket ticket, Device::Stream compute_stream, double timeout_seconds = 60.0);

  // The pages of a waited ticket, in the order of experts_of(ticket).
  std::vector<const uint8_t*> pages(Ticket ticket) const;

  // Record `compute_stream`'s event: the group's slots may be refilled behind it. Starts queued copies.
  void release(Ticket ticket, Device::Stream compute_stream);

  // Give up tickets that were prefetched but will not be waited for (routing changed, an exception).
  void cancel(Ticket ticket);

  // Drop every queued or held ticket, e.g. after an exception in the middle of a sweep.
  void reset();

  PagerStats stats() const;
  void reset_stats();

 private:
  struct Impl;  // slots, queue and next-use order; see expert_pager.cpp
  std::shared_ptr<Device> device_;
  std::shared_ptr<const ExpertStore> store_;
  int64_t num_slots_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace usaf

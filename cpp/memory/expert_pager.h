// The device side of the experts: N equal slots in a slab that the caller owns, filled from an ExpertStore by
// asynchronous copies on a copy-in stream. A state machine over device_api.h; no torch, no kernels.
//
// Use, for each sweep over a layer:   tickets = prefetch(layer, experts, phase)
//                                     for t in tickets:  wait(t);  compute with slot_of(t, i);  release(t)
// The order of use is known (layers up, then down, then up again), so the page to evict is the one whose next use is
// farthest (Belady). A slot is refilled only behind the compute stream's release event.
//
// From a store on disk the pages come through a ring of host buffers (page_ring.h): reader threads read ahead what the
// tickets ask for, in their order, and each page's copy is queued as soon as it is read and has a slot. Buffers beyond
// the read-ahead keep pages, again those with the nearest next use.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "../device_api.h"
#include "expert_store.h"
#include "page_reader.h"
#include "use_order.h"

namespace usaf {

struct PagerStats {
  int64_t page_hits = 0, page_misses = 0;
  int64_t bytes_in = 0;           // host to device
  int64_t bytes_out = 0;          // device to host (0: slots are never dirty)
  int64_t bytes_read = 0;         // from disk
  double stall_seconds = 0;       // host time spent inside wait()
  double read_stall_seconds = 0;  // of it, for pages that were not read yet
};

class ExpertPager {
 public:
  using Ticket = int64_t;  // unique for the pager's life: a generation, never reused

  // `slab`: num_slots * store->layout().page_bytes bytes on the device, owned by the caller, 64-byte aligned.
  // `num_buffers`: host buffers of page_bytes, the pager's own; 0 for a store in memory. `reader`: for tests; null: one
  // with threads for a store on disk.
  // Throws BudgetError with fewer than two slots (or, on disk, buffers), StoreError unless the store is sealed (copies
  // read it at any time) or when the buffers cannot be had, std::invalid_argument for a null or unaligned slab and for
  // buffers that a store in memory has no use for.
  ExpertPager(std::shared_ptr<Device> device, std::shared_ptr<const ExpertStore> store, void* slab, int64_t num_slots,
              int64_t num_buffers = 0, std::unique_ptr<PageReader> reader = nullptr);
  ~ExpertPager();  // waits for reads and copies in flight; in a child of fork() for nothing, and gives nothing back
  ExpertPager(const ExpertPager&) = delete;
  ExpertPager& operator=(const ExpertPager&) = delete;

  const ExpertStore& store() const { return *store_; }
  Device& device() { return *device_; }
  const std::shared_ptr<Device>& shared_device() const { return device_; }
  int64_t num_slots() const { return num_slots_; }
  int64_t max_group() const { return num_slots_ / 2; }

  // Queue `experts` (ascending, distinct) of `layer`; one ticket for each group of at most max_group() of them, in
  // order. Starts every copy that a free slot allows; the rest start in later calls. Never blocks.
  // Throws std::invalid_argument for a layer or expert out of range or an unsorted list.
  std::vector<Ticket> prefetch(int64_t layer, const std::vector<int64_t>& experts, Phase phase);

  const std::vector<int64_t>& experts_of(Ticket ticket) const;

  // Start the group's copies if they are not yet, and those of every ticket before it: blocks while its pages are being
  // read from disk. Then make `compute_stream` wait for the copies (on the CPU the caller itself waits). Once for each
  // ticket. Throws std::invalid_argument (naming what to release) if the group needs a slot that an earlier, unreleased
  // ticket holds, and for a ticket already waited for, released or unknown; StoreError for a failed read and
  // DeviceError for a failed copy, which a later prefetch of the page does again.
  void wait(Ticket ticket, Device::Stream compute_stream);

  // The pages of a waited ticket, in the order of experts_of(ticket).
  std::vector<const uint8_t*> pages(Ticket ticket) const;

  // After the last use by `compute_stream`: the group's slots may be refilled behind that. Starts queued copies.
  // A stream that wait() or release() is given lives as long as the pager: one that it knows is not made to wait twice.
  // Throws std::invalid_argument for a ticket that was not waited for (cancel it instead).
  void release(Ticket ticket, Device::Stream compute_stream);

  // Give up a ticket: one that will not be waited for (routing changed), or, after an exception, a waited one, whose
  // slots are refilled behind what the stream of its wait() was given so far.
  void cancel(Ticket ticket);

  // Cancel every ticket, e.g. after an exception in the middle of a sweep. Pages on the device stay there.
  void reset();

  // Of a store on disk: use that many host buffers, at least two and at most as many as at first; the memory of the
  // others is given back. Blocks for reads and copies under way.
  int64_t num_buffers() const;
  const HostRegistration* buffer_registration() const;  // null for a store in memory
  void resize_ring(int64_t num_buffers);

  PagerStats stats() const;
  void reset_stats();

  struct State;  // pager_state.h

 private:
  void check_buffers(int64_t num_buffers, bool on_disk) const;

  std::shared_ptr<Device> device_;
  std::shared_ptr<const ExpertStore> store_;
  int64_t num_slots_;
  std::unique_ptr<State> state_;
};

}  // namespace usaf

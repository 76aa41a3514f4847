// The state machine behind ExpertPager. One mutex guards it; the reader's threads enter it through read_finished().
//
// A group (ticket) is queued, then admitted: each of its pages gets a slot, whose old page is forgotten. A slot whose
// copy is not queued yet is `pending`. pump() queues the copies of pending slots whose page is in host memory, and has
// the pages that are not there read, in the order of the tickets. What always holds:
//   - the queue is admitted strictly in order, so everything before a group is used before it: choosing victims by
//     their next use *after* the group is Belady's rule on the whole sequence, however far ahead the copies run;
//   - a slot that an admitted group uses (`holds` above 0) is not refilled; a pending slot has holds above 0;
//   - a slot's copy runs behind its latest use, on the copy stream (`released`);
//   - the copies that one pump() queues for a group share an event, recorded behind them, and so do the uses that one
//     release() ends. A stream waits once for each event that its group's slots have: for all of several (copies from
//     disk are queued as their reads end), since only the first one behind a copy tells of its failure;
//   - a ring buffer is read to only behind its latest copy, and copied from only when its read is over;
//   - the first page that is missing can always be read, whatever the ring holds for later ones: no wait is for ever.
#pragma once
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "expert_pager.h"
#include "page_reader.h"
#include "page_ring.h"
#include "stream_mark.h"

namespace usaf {

struct ExpertPager::State {
  static constexpr int64_t kNoPage = -1;

  struct Slot {
    int64_t page = kNoPage;  // layer * num_experts + expert
    int64_t holds = 0;       // admitted groups that use it
    bool pending = false;
    SharedMark ready;     // of its latest copy
    SharedMark released;  // of its latest use; null when the copy stream comes behind that
  };

  struct Group {
    Phase phase;
    int64_t layer;
    std::vector<int64_t> experts;
    std::vector<int64_t> slots = {};  // empty until admitted
    bool waited = false;
    Device::Stream stream = nullptr;  // of its wait()
  };
  using Entry = std::map<Ticket, Group>::iterator;

  State(std::shared_ptr<Device> device, const ExpertStore& store, uint8_t* slab, int64_t num_slots,
        std::unique_ptr<PageReader> page_reader, int64_t num_buffers);
  ~State();

  // ---- groups ----
  Entry find(Ticket ticket);
  Entry find_waited(Ticket ticket, const char* advice);
  void erase(Entry entry);
  void clear();
  void admit_look_ahead();
  void admit_up_to(Ticket ticket);
  std::string why_not_admitted(Ticket ticket, Ticket blocked) const;

  // ---- replacement ----
  int64_t next_use(const Position& here, int64_t page) const;
  bool needs(const Group& group, int64_t page) const;
  // `count` slots for the group, the page with the farthest next use first, or nothing if they cannot be had (yet).
  std::optional<std::vector<int64_t>> find_victims(const Group& group, size_t count, bool look_ahead) const;
  bool admit(Group& group, bool look_ahead);

  // ---- slots ----
  int64_t page_of(const Group& group, size_t i) const { return group.layer * num_experts + group.experts[i]; }
  int64_t find_slot(int64_t page) const { return slot_of_page[static_cast<size_t>(page)]; }
  Slot& slot_at(int64_t index) { return slots[static_cast<size_t>(index)]; }
  void forget(Slot& slot);
  void drop_hold(Slot& slot);
  void record_release(const Group& group, Device::Stream stream);
  void make_wait(Device::Stream stream, StreamMark& mark);
  // What `stream` does not come behind yet.
  std::vector<SharedMark> copies_to_await(const std::vector<int64_t>& slot_indices, Device::Stream stream);

  // ---- copies and reads (pager_copies.cpp) ----
  void pump();
  bool copy(int64_t slot_index, const uint8_t* source);
  void finish_copies(const std::vector<int64_t>& slot_indices);
  void read_missing(const std::vector<int64_t>& missing);
  int64_t next_read_use(int64_t page) const;
  void read_finished(int64_t buffer_index, std::exception_ptr error);
  // Until no slot of the ticket is pending. Throws what went wrong with one of its pages.
  void await_copies(Ticket ticket, std::unique_lock<std::mutex>& lock);
  void resize_ring(int64_t num_buffers, std::unique_lock<std::mutex>& lock);

  std::mutex mutex;  // first: the reader's end still locks it
  const std::shared_ptr<Device> device;
  const ExpertStore& store;
  uint8_t* const slab;
  const int64_t num_experts;
  const UseOrder order;
  Device::Stream copy_stream = nullptr;
  StreamMarks marks;
  std::vector<Slot> slots;
  std::vector<int64_t> slot_of_page;  // or -1
  std::map<Ticket, Group> groups;     // not yet released
  std::deque<Ticket> queue;           // of them, not yet admitted
  std::optional<Position> current;    // the latest wait
  Ticket next_ticket = 0;
  PagerStats stats;
  // Pages that could not be read or copied. Not tried again until they are prefetched anew.
  std::map<int64_t, std::exception_ptr> failed;
  std::exception_ptr broken;  // something else, on a reader's thread

  // On disk only.
  std::unique_ptr<PageRing> ring;
  std::unique_ptr<PageReader> reader;
  std::vector<int64_t> asked_order;  // by page: its place in the present pump's list of missing pages, or -1
  bool paused = false;               // no new reads
};

}  // namespace usaf

#include "pager_state.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "../errors.h"

namespace usaf {

using State = ExpertPager::State;

State::State(std::shared_ptr<Device> device_in, const ExpertStore& store, uint8_t* slab, int64_t num_slots,
             std::unique_ptr<PageReader> page_reader, int64_t num_buffers)
    : device(std::move(device_in)),
      store(store),
      slab(slab),
      num_experts(store.num_experts()),
      order{store.num_layers(), num_experts},
      marks(device),
      slots(static_cast<size_t>(num_slots)),
      slot_of_page(static_cast<size_t>(store.num_layers() * num_experts), -1),
      reader(std::move(page_reader)) {
  try {
    copy_stream = device->create_stream();
    if (reader) {
      const int64_t num_pages = store.num_layers() * num_experts;
      ring = std::make_unique<PageRing>(device, num_pages, store.layout().page_bytes, num_buffers);
      asked_order.assign(static_cast<size_t>(num_pages), -1);
      reader->start(mutex, [this](int64_t buffer_index, std::exception_ptr error) {
        read_finished(buffer_index, std::move(error));
      });
    }
  } catch (...) {
    if (copy_stream) device->destroy_stream(copy_stream);
    throw;
  }
}

State::~State() {
  if (reader) reader->stop();
  try {
    device->synchronize(marks.record(copy_stream)->event);
  } catch (const DeviceError&) {  // a copy failed, or the device did: nothing more can be waited for
  }
  ring.reset();
  device->destroy_stream(copy_stream);
}

// ---- groups ----

State::Entry State::find(Ticket ticket) {
  const auto found = groups.find(ticket);
  if (found == groups.end()) {
    const bool past = ticket >= 0 && ticket < next_ticket;
    throw std::invalid_argument("ticket " + std::to_string(ticket) +
                                (past ? " was released or cancelled already" : " is unknown: prefetch never gave it"));
  }
  return found;
}

State::Entry State::find_waited(Ticket ticket, const char* advice) {
  const auto found = find(ticket);
  if (!found->second.waited) {
    throw std::invalid_argument("ticket " + std::to_string(ticket) + " was not waited for: " + advice);
  }
  return found;
}

void State::erase(Entry entry) {
  for (int64_t index : entry->second.slots) drop_hold(slot_at(index));
  if (const auto queued = std::find(queue.begin(), queue.end(), entry->first); queued != queue.end()) {
    queue.erase(queued);
  }
  groups.erase(entry);
}

// Forget all groups, and what failed.
void State::clear() {
  std::map<Ticket, Group> dropped;
  dropped.swap(groups);
  queue.clear();
  current.reset();
  failed.clear();
  for (const auto& [ticket, group] : dropped) {
    for (int64_t index : group.slots) drop_hold(slot_at(index));
  }
  for (const auto& [ticket, group] : dropped) {
    if (group.waited) record_release(group, group.stream);
  }
}

void State::admit_look_ahead() {
  while (!queue.empty() && admit(groups.at(queue.front()), true)) queue.pop_front();
}

void State::admit_up_to(Ticket ticket) {
  while (!queue.empty() && queue.front() <= ticket) {
    const Ticket next = queue.front();
    if (!admit(groups.at(next), false)) {
      pump();  // for those before it
      throw std::invalid_argument(why_not_admitted(ticket, next));
    }
    queue.pop_front();
  }
}

std::string State::why_not_admitted(Ticket ticket, Ticket blocked) const {
  std::string holders;
  for (const auto& [other, group] : groups) {
    if (other < blocked && !group.slots.empty()) holders += (holders.empty() ? "" : ", ") + std::to_string(other);
  }
  return "cannot wait for ticket " + std::to_string(ticket) + ": " +
         (blocked == ticket ? "it" : "ticket " + std::to_string(blocked) + " before it") +
         " needs slots that earlier tickets hold; first release or cancel ticket " + holders;
}

// ---- replacement ----

int64_t State::next_use(const Position& here, int64_t page) const {
  return order.next_use(here, page / num_experts, page % num_experts);
}

bool State::needs(const Group& group, int64_t page) const {
  return page / num_experts == group.layer &&
         std::binary_search(group.experts.begin(), group.experts.end(), page % num_experts);
}

std::optional<std::vector<int64_t>> State::find_victims(const Group& group, size_t count, bool look_ahead) const {
  if (count == 0) return std::vector<int64_t>();  // mostly: what follows looks at every slot
  struct Candidate {
    int64_t next_use, slot;
    bool free;
  };
  constexpr int64_t never = std::numeric_limits<int64_t>::max();
  const Position here{group.phase, group.layer, group.experts.back()};
  const int64_t own_use = current ? order.use_in(*current, group.phase, group.layer, group.experts.front()) : 0;
  std::vector<Candidate> candidates;
  for (size_t i = 0; i < slots.size(); ++i) {
    const Slot& slot = slots[i];
    if (slot.page != kNoPage && needs(group, slot.page)) continue;
    const bool free = slot.holds == 0;
    // Not what is used before the group by layers that nobody has prefetched yet.
    if (look_ahead && free && slot.page != kNoPage && current && next_use(*current, slot.page) < own_use) continue;
    candidates.push_back({slot.page == kNoPage ? never : next_use(here, slot.page), static_cast<int64_t>(i), free});
  }
  if (candidates.size() < count) return std::nullopt;
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.next_use != b.next_use ? a.next_use > b.next_use : a.slot < b.slot;
  };
  const auto last = candidates.begin() + static_cast<std::ptrdiff_t>(count) - 1;

  // Ahead of its time a group of a training step takes only what it would take at its time; any page of the same
  // layer is as good, but for its own layer, which a small budget uses again at the turn. Inference always reuses the
  // pages just used: waiting for those would mean no copy beside the computation, so there it takes the best free.
  int64_t nearest_allowed = std::numeric_limits<int64_t>::min();
  if (look_ahead && group.phase != Phase::inference) {
    std::nth_element(candidates.begin(), last, candidates.end(), better);
    const int64_t page = slots[static_cast<size_t>(last->slot)].page;
    nearest_allowed = last->next_use;
    if (page == kNoPage || page / num_experts != group.layer) nearest_allowed -= nearest_allowed % num_experts;
  }
  std::erase_if(candidates, [&](const Candidate& c) { return !c.free || c.next_use < nearest_allowed; });
  if (candidates.size() < count) return std::nullopt;
  std::partial_sort(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(count), candidates.end(),
                    better);
  std::vector<int64_t> victims;
  for (size_t i = 0; i < count; ++i) victims.push_back(candidates[i].slot);
  return victims;
}

bool State::admit(Group& group, bool look_ahead) {
  size_t misses = 0;
  for (size_t i = 0; i < group.experts.size(); ++i) misses += find_slot(page_of(group, i)) < 0;
  const auto victims = find_victims(group, misses, look_ahead);
  if (!victims) return false;
  auto victim = victims->begin();
  for (size_t i = 0; i < group.experts.size(); ++i) {
    const int64_t page = page_of(group, i);
    if (find_slot(page) < 0) {
      Slot& slot = slot_at(*victim);
      forget(slot);
      slot.page = page;
      slot.pending = true;
      slot_of_page[static_cast<size_t>(page)] = *victim++;
    }
    group.slots.push_back(find_slot(page));
    ++slot_at(group.slots.back()).holds;
  }
  stats.page_misses += static_cast<int64_t>(misses);
  stats.page_hits += static_cast<int64_t>(group.experts.size() - misses);
  return true;
}

// ---- slots ----

void State::forget(Slot& slot) {
  if (slot.page == kNoPage) return;
  slot_of_page[static_cast<size_t>(slot.page)] = -1;
  slot.page = kNoPage;
}

void State::drop_hold(Slot& slot) {
  if (--slot.holds > 0 || !slot.pending) return;
  forget(slot);
  slot.pending = false;
}

// Later refills of the group's slots come after what `stream` was given so far.
void State::record_release(const Group& group, Device::Stream stream) {
  for (int64_t index : group.slots) {
    // A slot knows its latest use only: an earlier one by another stream is handed to the copy stream.
    const SharedMark& earlier = slot_at(index).released;
    if (earlier && earlier->stream != stream) make_wait(copy_stream, *earlier);
  }
  const SharedMark mark = marks.record(stream);
  for (int64_t index : group.slots) slot_at(index).released = mark;
}

std::vector<SharedMark> State::copies_to_await(const std::vector<int64_t>& slot_indices, Device::Stream stream) {
  std::vector<SharedMark> found;
  for (int64_t index : slot_indices) {
    const SharedMark& ready = slot_at(index).ready;
    if (ready->is_awaited_by(stream) || std::find(found.begin(), found.end(), ready) != found.end()) continue;
    found.push_back(ready);
  }
  return found;
}

void State::make_wait(Device::Stream stream, StreamMark& mark) {
  if (mark.is_awaited_by(stream)) return;
  device->stream_wait(stream, mark.event);
  mark.awaited_by = stream;
}

}  // namespace usaf

#include "expert_pager.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <exception>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "../errors.h"

namespace usaf {
namespace {

constexpr int64_t kNoPage = -1;

struct Slot {
  int64_t page = kNoPage;            // layer * num_experts + expert
  int64_t holds = 0;                 // admitted groups that use it; above 0 it is not refilled
  Device::Event ready = nullptr;     // of its latest copy
  Device::Event released = nullptr;  // of its latest use
  Device::Stream released_on = nullptr;
};

struct Group {
  Phase phase;
  int64_t layer;
  std::vector<int64_t> experts;
  std::vector<int64_t> slots = {};  // empty until admitted
  bool waited = false;
  Device::Stream stream = nullptr;  // of its wait()
};

}  // namespace

// The queue is admitted strictly in order, so at each admission everything before it is used before it: choosing
// victims by their next use *after* the group is Belady's rule on the whole sequence, however far ahead the copies run.
struct ExpertPager::State {
  State(Device& device, const ExpertStore& store, uint8_t* slab, int64_t num_slots)
      : device(device),
        store(store),
        slab(slab),
        num_experts(store.num_experts()),
        order{store.num_layers(), num_experts},
        slots(static_cast<size_t>(num_slots)),
        slot_of_page(static_cast<size_t>(store.num_layers() * num_experts), -1) {
    try {
      copy_stream = device.create_stream();
      for (Slot& slot : slots) {
        slot.ready = device.create_event();
        slot.released = device.create_event();
      }
    } catch (...) {
      destroy_handles();
      throw;
    }
  }

  ~State() {
    for (Slot& slot : slots) {
      try {
        device.synchronize(slot.ready);
      } catch (const DeviceError&) {  // the copy failed, so it is over
      }
    }
    destroy_handles();
  }

  void destroy_handles() noexcept {
    for (Slot& slot : slots) {
      if (slot.ready) device.destroy_event(slot.ready);
      if (slot.released) device.destroy_event(slot.released);
    }
    if (copy_stream) device.destroy_stream(copy_stream);
  }

  // ---- replacement ----

  int64_t next_use(const Position& here, int64_t page) const {
    return order.next_use(here, page / num_experts, page % num_experts);
  }

  bool needs(const Group& group, int64_t page) const {
    return page / num_experts == group.layer &&
           std::binary_search(group.experts.begin(), group.experts.end(), page % num_experts);
  }

  // `count` slots for the group, the page with the farthest next use first, or nothing if they cannot be had (yet).
  std::optional<std::vector<int64_t>> find_victims(const Group& group, size_t count, bool look_ahead) const {
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
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
      return a.next_use != b.next_use ? a.next_use > b.next_use : a.slot < b.slot;
    });

    // Ahead of its time a group of a training step takes only what it would take at its time; any page of the same
    // layer is as good, but for its own layer, which a small budget uses again at the turn. Inference always reuses the
    // pages just used: waiting for those would mean no copy beside the computation, so there it takes the best free.
    int64_t nearest_allowed = std::numeric_limits<int64_t>::min();
    if (look_ahead && group.phase != Phase::inference && count > 0) {
      if (candidates.size() < count) return std::nullopt;
      const Candidate& last = candidates[count - 1];
      const int64_t page = slots[static_cast<size_t>(last.slot)].page;
      nearest_allowed = last.next_use;
      if (page == kNoPage || page / num_experts != group.layer) nearest_allowed -= nearest_allowed % num_experts;
    }
    std::vector<int64_t> victims;
    for (const Candidate& candidate : candidates) {
      if (victims.size() == count || candidate.next_use < nearest_allowed) break;
      if (candidate.free) victims.push_back(candidate.slot);
    }
    if (victims.size() < count) return std::nullopt;
    return victims;
  }

  // ---- slots ----

  int64_t find_slot(const Group& group, size_t i) const {
    return slot_of_page[static_cast<size_t>(group.layer * num_experts + group.experts[i])];
  }

  Slot& slot_at(int64_t index) { return slots[static_cast<size_t>(index)]; }

  void forget(Slot& slot) {
    if (slot.page == kNoPage) return;
    slot_of_page[static_cast<size_t>(slot.page)] = -1;
    slot.page = kNoPage;
  }

  // Should a call of the device throw, the slot is left empty; the copy stream keeps a later refill in order.
  void fill(int64_t index, int64_t page) {
    Slot& slot = slot_at(index);
    forget(slot);
    const int64_t bytes = store.layout().page_bytes;
    device.stream_wait(copy_stream, slot.released);
    device.copy_async(slab + index * bytes, store.page(page / num_experts, page % num_experts), bytes, copy_stream);
    device.record(slot.ready, copy_stream);
    slot.page = page;
    slot_of_page[static_cast<size_t>(page)] = index;
    stats.bytes_in += bytes;
  }

  bool admit(Group& group, bool look_ahead) {
    size_t misses = 0;
    for (size_t i = 0; i < group.experts.size(); ++i) misses += find_slot(group, i) < 0;
    const auto victims = find_victims(group, misses, look_ahead);
    if (!victims) return false;
    auto victim = victims->begin();
    std::vector<int64_t> taken;
    for (size_t i = 0; i < group.experts.size(); ++i) {
      if (find_slot(group, i) < 0) fill(*victim++, group.layer * num_experts + group.experts[i]);
      taken.push_back(find_slot(group, i));
    }
    for (int64_t index : taken) ++slot_at(index).holds;
    group.slots = std::move(taken);
    stats.page_misses += static_cast<int64_t>(misses);
    stats.page_hits += static_cast<int64_t>(group.experts.size() - misses);
    return true;
  }

  void admit_look_ahead() {
    while (!queue.empty() && admit(groups.at(queue.front()), true)) queue.pop_front();
  }

  void admit_up_to(Ticket ticket) {
    while (!queue.empty() && queue.front() <= ticket) {
      const Ticket next = queue.front();
      if (!admit(groups.at(next), false)) throw std::invalid_argument(why_not_admitted(ticket, next));
      queue.pop_front();
    }
  }

  std::string why_not_admitted(Ticket ticket, Ticket blocked) const {
    std::string holders;
    for (const auto& [other, group] : groups) {
      if (other < blocked && !group.slots.empty()) holders += (holders.empty() ? "" : ", ") + std::to_string(other);
    }
    return "cannot wait for ticket " + std::to_string(ticket) + ": " +
           (blocked == ticket ? "it" : "ticket " + std::to_string(blocked) + " before it") +
           " needs slots that earlier tickets hold; first release or cancel ticket " + holders;
  }

  // Later refills of the group's slots come after what `stream` was given so far.
  void record_release(const Group& group, Device::Stream stream) {
    for (int64_t index : group.slots) {
      Slot& slot = slot_at(index);
      // One event a slot: an earlier use by another stream is handed to the copy stream before it is overwritten.
      if (slot.released_on != stream) device.stream_wait(copy_stream, slot.released);
      device.record(slot.released, stream);
      slot.released_on = stream;
    }
  }

  void erase(std::map<Ticket, Group>::iterator entry) {
    for (int64_t index : entry->second.slots) --slot_at(index).holds;
    if (const auto queued = std::find(queue.begin(), queue.end(), entry->first); queued != queue.end()) {
      queue.erase(queued);
    }
    groups.erase(entry);
  }

  std::map<Ticket, Group>::iterator find(Ticket ticket) {
    const auto found = groups.find(ticket);
    if (found == groups.end()) {
      const bool past = ticket >= 0 && ticket < next_ticket;
      throw std::invalid_argument(
          "ticket " + std::to_string(ticket) +
          (past ? " was released or cancelled already" : " is unknown: prefetch never gave it"));
    }
    return found;
  }

  std::map<Ticket, Group>::iterator find_waited(Ticket ticket, const char* advice) {
    const auto found = find(ticket);
    if (!found->second.waited) {
      throw std::invalid_argument("ticket " + std::to_string(ticket) + " was not waited for: " + advice);
    }
    return found;
  }

  Device& device;
  const ExpertStore& store;
  uint8_t* slab;
  const int64_t num_experts;
  const UseOrder order;
  Device::Stream copy_stream = nullptr;
  std::vector<Slot> slots;
  std::vector<int64_t> slot_of_page;  // or -1
  std::map<Ticket, Group> groups;     // not yet released
  std::deque<Ticket> queue;           // of them, not yet admitted
  std::optional<Position> current;    // the latest wait
  Ticket next_ticket = 0;
  PagerStats stats;
  std::mutex mutex;
};

ExpertPager::ExpertPager(std::shared_ptr<Device> device, std::shared_ptr<const ExpertStore> store, void* slab,
                         int64_t num_slots)
    : device_(std::move(device)), store_(std::move(store)), num_slots_(num_slots) {
  if (num_slots < 2) {
    throw BudgetError("the pager needs at least 2 slots of " + std::to_string(store_->layout().page_bytes) +
                      " bytes, got " + std::to_string(num_slots));
  }
  if (!store_->sealed()) throw StoreError("the pager needs a sealed store");
  if (slab == nullptr || reinterpret_cast<uintptr_t>(slab) % kPartAlign != 0) {
    throw std::invalid_argument("slab: expected a pointer aligned to " + std::to_string(kPartAlign) + " bytes");
  }
  state_ = std::make_unique<State>(*device_, *store_, static_cast<uint8_t*>(slab), num_slots);
}

ExpertPager::~ExpertPager() = default;

std::vector<ExpertPager::Ticket> ExpertPager::prefetch(int64_t layer, const std::vector<int64_t>& experts,
                                                       Phase phase) {
  std::lock_guard lock(state_->mutex);
  if (layer < 0 || layer >= store_->num_layers()) {
    throw std::invalid_argument("layer: expected 0 to " + std::to_string(store_->num_layers() - 1) + ", got " +
                                std::to_string(layer));
  }
  for (size_t i = 0; i < experts.size(); ++i) {
    if (experts[i] < 0 || experts[i] >= state_->num_experts || (i > 0 && experts[i] <= experts[i - 1])) {
      throw std::invalid_argument("experts: expected ascending numbers below " + std::to_string(state_->num_experts) +
                                  ", each once, got " + std::to_string(experts[i]) + " at " + std::to_string(i));
    }
  }
  // Groups of equal size, so that the last is not a small one with nothing to hide its copies behind.
  const int64_t count = static_cast<int64_t>(experts.size());
  const int64_t num_groups = (count + max_group() - 1) / max_group();
  std::vector<Ticket> tickets;
  for (int64_t i = 0; i < num_groups; ++i) {
    tickets.push_back(state_->next_ticket++);
    Group group{
        phase, layer, {experts.begin() + i * count / num_groups, experts.begin() + (i + 1) * count / num_groups}};
    state_->groups.emplace(tickets.back(), std::move(group));
    state_->queue.push_back(tickets.back());
  }
  try {
    state_->admit_look_ahead();
  } catch (...) {
    for (Ticket ticket : tickets) state_->erase(state_->find(ticket));  // the caller never gets them
    throw;
  }
  return tickets;
}

const std::vector<int64_t>& ExpertPager::experts_of(Ticket ticket) const {
  std::lock_guard lock(state_->mutex);
  return state_->find(ticket)->second.experts;
}

void ExpertPager::wait(Ticket ticket, Device::Stream compute_stream) {
  std::lock_guard lock(state_->mutex);
  const auto start = std::chrono::steady_clock::now();
  Group& group = state_->find(ticket)->second;
  if (group.waited) throw std::invalid_argument("ticket " + std::to_string(ticket) + " was waited for already");
  state_->admit_up_to(ticket);
  state_->current = Position{group.phase, group.layer, group.experts.back()};
  state_->admit_look_ahead();
  std::exception_ptr failure;
  for (int64_t index : group.slots) {
    try {
      state_->device.stream_wait(compute_stream, state_->slot_at(index).ready);
    } catch (const DeviceError&) {
      state_->forget(state_->slot_at(index));
      if (!failure) failure = std::current_exception();
    }
  }
  state_->stats.stall_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (failure) std::rethrow_exception(failure);
  group.waited = true;
  group.stream = compute_stream;
}

std::vector<const uint8_t*> ExpertPager::pages(Ticket ticket) const {
  std::lock_guard lock(state_->mutex);
  const Group& group = state_->find_waited(ticket, "its pages may not be there yet")->second;
  std::vector<const uint8_t*> pages;
  for (int64_t index : group.slots) pages.push_back(state_->slab + index * store_->layout().page_bytes);
  return pages;
}

void ExpertPager::release(Ticket ticket, Device::Stream compute_stream) {
  std::lock_guard lock(state_->mutex);
  const auto entry = state_->find_waited(ticket, "cancel it instead");
  state_->record_release(entry->second, compute_stream);
  state_->erase(entry);
  state_->admit_look_ahead();
}

void ExpertPager::cancel(Ticket ticket) {
  std::lock_guard lock(state_->mutex);
  const auto entry = state_->find(ticket);
  if (entry->second.waited) state_->record_release(entry->second, entry->second.stream);
  state_->erase(entry);
}

void ExpertPager::reset() {
  std::lock_guard lock(state_->mutex);
  std::map<Ticket, Group> dropped;
  dropped.swap(state_->groups);
  state_->queue.clear();
  state_->current.reset();
  for (Slot& slot : state_->slots) slot.holds = 0;
  for (const auto& [ticket, group] : dropped) {
    if (group.waited) state_->record_release(group, group.stream);
  }
}

PagerStats ExpertPager::stats() const {
  std::lock_guard lock(state_->mutex);
  return state_->stats;
}

void ExpertPager::reset_stats() {
  std::lock_guard lock(state_->mutex);
  state_->stats = {};
}

}  // namespace usaf

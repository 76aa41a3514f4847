#include "expert_pager.h"

#include <chrono>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

#include "../errors.h"
#include "pager_state.h"

namespace usaf {
namespace {

// Enough for what the system splits a large read into, and for several small ones at once.
constexpr int64_t kReaderThreads = 4;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

ExpertPager::ExpertPager(std::shared_ptr<Device> device, std::shared_ptr<const ExpertStore> store, void* slab,
                         int64_t num_slots, int64_t num_buffers, std::unique_ptr<PageReader> reader)
    : device_(std::move(device)), store_(std::move(store)), num_slots_(num_slots) {
  const std::string page_bytes = std::to_string(store_->layout().page_bytes);
  if (num_slots < 2) {
    throw BudgetError("the pager needs at least 2 slots of " + page_bytes + " bytes, got " + std::to_string(num_slots));
  }
  if (!store_->sealed()) throw StoreError("the pager needs a sealed store");
  if (slab == nullptr || reinterpret_cast<uintptr_t>(slab) % kPartAlign != 0) {
    throw std::invalid_argument("slab: expected a pointer aligned to " + std::to_string(kPartAlign) + " bytes");
  }
  if (store_->on_disk() && !reader) {
    const auto read_page = [store = store_.get()](int64_t page, uint8_t* buffer) {
      store->read_page(page / store->num_experts(), page % store->num_experts(), buffer);
    };
    reader = std::make_unique<ThreadedPageReader>(device_, read_page, kReaderThreads);
  }
  check_buffers(num_buffers, reader != nullptr);
  state_ =
      std::make_unique<State>(device_, *store_, static_cast<uint8_t*>(slab), num_slots, std::move(reader), num_buffers);
}

void ExpertPager::check_buffers(int64_t num_buffers, bool on_disk) const {
  if (!on_disk && num_buffers != 0) {
    throw std::invalid_argument("num_buffers: expected 0 for a store in memory, got " + std::to_string(num_buffers));
  }
  if (on_disk && num_buffers < 2) {
    throw BudgetError("a store on disk needs at least 2 host buffers of " +
                      std::to_string(store_->layout().page_bytes) + " bytes, got " + std::to_string(num_buffers));
  }
}

ExpertPager::~ExpertPager() {
  // The readers that its parts would wait for stayed in the parent.
  if (device_->is_left_behind()) static_cast<void>(state_.release());
}

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
  for (int64_t expert : experts) state_->failed.erase(layer * state_->num_experts + expert);
  for (int64_t i = 0; i < num_groups; ++i) {
    tickets.push_back(state_->next_ticket++);
    State::Group group{
        phase, layer, {experts.begin() + i * count / num_groups, experts.begin() + (i + 1) * count / num_groups}};
    state_->groups.emplace(tickets.back(), std::move(group));
    state_->queue.push_back(tickets.back());
  }
  try {
    state_->admit_look_ahead();
    state_->pump();
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
  std::unique_lock lock(state_->mutex);
  const auto start = std::chrono::steady_clock::now();
  const State::Group& group = state_->find(ticket)->second;
  if (group.waited) throw std::invalid_argument("ticket " + std::to_string(ticket) + " was waited for already");
  state_->admit_up_to(ticket);
  state_->current = Position{group.phase, group.layer, group.experts.back()};
  state_->admit_look_ahead();
  state_->pump();
  state_->await_copies(ticket, lock);

  // Reads that end meanwhile need the mutex; the marks keep their events.
  const std::vector<int64_t> slots = state_->find(ticket)->second.slots;
  const std::vector<SharedMark> copies = state_->copies_to_await(slots, compute_stream);
  std::vector<std::exception_ptr> failures(copies.size());
  lock.unlock();
  for (size_t i = 0; i < copies.size(); ++i) {
    try {
      device_->stream_wait(compute_stream, copies[i]->event);
    } catch (...) {
      failures[i] = std::current_exception();
    }
  }
  lock.lock();
  std::exception_ptr failure;
  for (size_t i = 0; i < copies.size(); ++i) {
    if (!failures[i]) {
      copies[i]->awaited_by = compute_stream;
      continue;
    }
    if (!failure) failure = failures[i];
    for (int64_t index : slots) {
      if (state_->slot_at(index).ready == copies[i]) state_->forget(state_->slot_at(index));
    }
  }
  state_->stats.stall_seconds += seconds_since(start);
  if (failure) std::rethrow_exception(failure);
  State::Group& waited = state_->find(ticket)->second;
  waited.waited = true;
  waited.stream = compute_stream;
}

std::vector<const uint8_t*> ExpertPager::pages(Ticket ticket) const {
  std::lock_guard lock(state_->mutex);
  const State::Group& group = state_->find_waited(ticket, "its pages may not be there yet")->second;
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
  state_->pump();
}

void ExpertPager::cancel(Ticket ticket) {
  std::lock_guard lock(state_->mutex);
  const auto entry = state_->find(ticket);
  if (entry->second.waited) state_->record_release(entry->second, entry->second.stream);
  state_->erase(entry);
}

void ExpertPager::reset() {
  std::lock_guard lock(state_->mutex);
  state_->clear();
}

int64_t ExpertPager::num_buffers() const {
  std::lock_guard lock(state_->mutex);
  return state_->ring ? state_->ring->num_buffers() : 0;
}

const HostRegistration* ExpertPager::buffer_registration() const {
  std::lock_guard lock(state_->mutex);
  return state_->ring ? &state_->ring->registration() : nullptr;
}

void ExpertPager::resize_ring(int64_t num_buffers) {
  std::unique_lock lock(state_->mutex);
  check_buffers(num_buffers, state_->ring != nullptr);
  if (!state_->ring) return;
  if (num_buffers > state_->ring->max_buffers()) {
    throw std::invalid_argument("num_buffers: expected at most " + std::to_string(state_->ring->max_buffers()) +
                                ", got " + std::to_string(num_buffers));
  }
  state_->resize_ring(num_buffers, lock);
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

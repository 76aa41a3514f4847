// How pages get to their slots: copies for admitted groups, and reads from disk ahead of them.
#include <chrono>
#include <utility>

#include "../errors.h"
#include "pager_state.h"

namespace usaf {
namespace {

// Pages that are read, or being read, before a copy of them can be queued. More would hide no more of the disk's time
// and would drive out of the ring what the next sweep finds there.
constexpr int64_t kReadAhead = 8;

}  // namespace

using State = ExpertPager::State;

void State::pump() {
  std::vector<int64_t> missing;
  for (const auto& [ticket, group] : groups) {
    if (group.waited) continue;
    std::vector<int64_t> copied;
    for (size_t i = 0; i < group.experts.size(); ++i) {
      const int64_t page = page_of(group, i), index = find_slot(page);
      if ((index >= 0 && !slot_at(index).pending) || failed.contains(page)) continue;
      const uint8_t* source = ring ? ring->ready(page) : store.page(group.layer, group.experts[i]);
      if (index >= 0 && source != nullptr) {
        if (copy(index, source)) copied.push_back(index);
      } else if (ring) {
        missing.push_back(page);
      }
    }
    finish_copies(copied);
  }
  if (ring && !paused) read_missing(missing);
}

// False if it cannot be queued. The slot is pending until finish_copies(), and stays so after a failure; the copy
// stream keeps a later refill in order.
bool State::copy(int64_t slot_index, const uint8_t* source) {
  Slot& slot = slot_at(slot_index);
  const int64_t bytes = store.layout().page_bytes;
  try {
    if (slot.released) make_wait(copy_stream, *slot.released);
    device->copy_async(slab + slot_index * bytes, source, bytes, copy_stream);
  } catch (const DeviceError&) {
    failed[slot.page] = std::current_exception();
    return false;
  }
  return true;
}

void State::finish_copies(const std::vector<int64_t>& slot_indices) {
  if (slot_indices.empty()) return;
  SharedMark mark;
  try {
    mark = marks.record(copy_stream);  // the first record after the copies: it carries their failure
    if (ring) {
      for (int64_t index : slot_indices) ring->record_copy(slot_at(index).page, copy_stream);
    }
  } catch (const DeviceError&) {
    for (int64_t index : slot_indices) failed[slot_at(index).page] = std::current_exception();
    return;
  }
  for (int64_t index : slot_indices) {
    Slot& slot = slot_at(index);
    slot.ready = mark;
    slot.released.reset();
    slot.pending = false;
  }
  stats.bytes_in += static_cast<int64_t>(slot_indices.size()) * store.layout().page_bytes;
}

// `missing`: pages that groups ask for and that are not on the device, in the order of their use.
void State::read_missing(const std::vector<int64_t>& missing) {
  const auto count = static_cast<int64_t>(missing.size());
  const auto order_of = [&](int64_t page) -> int64_t& { return asked_order[static_cast<size_t>(page)]; };
  for (int64_t i = count - 1; i >= 0; --i) order_of(missing[static_cast<size_t>(i)]) = i;
  const auto next_use = [&](int64_t page) {
    return order_of(page) >= 0 ? order_of(page) - count : next_read_use(page);
  };
  int64_t ahead = 0;
  for (int64_t i = 0; i < count && ahead < kReadAhead; ++i) {
    const int64_t page = missing[static_cast<size_t>(i)];
    if (order_of(page) != i) continue;
    if (!ring->holds(page)) {
      const auto read = ring->take(page, i - count, next_use);
      if (!read) break;
      reader->submit(*read);
    }
    ahead += ring->is_unused(page);
  }
  for (int64_t page : missing) order_of(page) = -1;
}

// When the ring is asked for `page` next. A page on the device is copied from the ring again only after it was driven
// out: not before a use that it is still there for.
int64_t State::next_read_use(int64_t page) const {
  if (!current) return 0;
  const int64_t layer = page / num_experts, expert = page % num_experts;
  Position at = *current;
  int64_t time = order.next_use(at, layer, expert);
  if (find_slot(page) < 0) return time;
  for (int sweeps = 0; sweeps < 2; ++sweeps) {
    const bool ahead = order.is_ahead(at, layer, expert);
    if (!ahead && order.pages_until_reused(at.phase, layer) >= static_cast<int64_t>(slots.size())) break;
    at = {ahead ? at.phase : UseOrder::phase_after(at.phase), layer, expert};
    time += order.next_use(at, layer, expert);
  }
  return time;
}

void State::read_finished(int64_t buffer_index, std::exception_ptr error) {
  const int64_t page = ring->finish(buffer_index, error == nullptr);
  if (error) {
    failed[page] = std::move(error);
  } else {
    stats.bytes_read += store.layout().page_bytes;
  }
  try {
    pump();
  } catch (...) {
    broken = std::current_exception();
  }
}

void State::await_copies(Ticket ticket, std::unique_lock<std::mutex>& lock) {
  for (;;) {
    if (broken) std::rethrow_exception(std::exchange(broken, nullptr));
    const Group& group = find(ticket)->second;
    bool pending = false;
    for (size_t i = 0; i < group.slots.size(); ++i) {
      if (!slot_at(group.slots[i]).pending) continue;
      pending = true;
      const auto failure = failed.find(page_of(group, i));
      if (failure != failed.end()) std::rethrow_exception(failure->second);
    }
    if (!pending) return;
    const auto start = std::chrono::steady_clock::now();
    reader->await(lock);
    stats.read_stall_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
}

void State::resize_ring(int64_t num_buffers, std::unique_lock<std::mutex>& lock) {
  paused = true;
  try {
    while (ring->reading()) reader->await(lock);
    ring->resize(num_buffers);
  } catch (...) {
    paused = false;
    throw;
  }
  paused = false;
  pump();
}

}  // namespace usaf

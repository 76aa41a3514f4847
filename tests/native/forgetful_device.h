// The virtual device under a pager that forgets waits. It keeps every wait back until something needs it, so that those
// that nothing needs are made late or never; and of the needed ones it forgets one, with all that are kept back then.
//
// What is needed follows from counting alone, not from what is in memory, which is how the virtual device finds out:
// on one copy stream and one compute stream an event stands for all copies, or kernels, that were queued before it.
// A wait is for the record of the time when it was asked for, so each record is an event of the virtual device's.
#pragma once
#include <algorithm>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "virtual_device.h"

namespace usaf {

enum class Fault { none, missing_wait, early_reuse };

class ForgetfulDevice final : public Device {
 public:
  // Forgets the needed wait of number `which`, counted from 0, of the kind that `fault` says.
  ForgetfulDevice(std::shared_ptr<VirtualDevice> device, Fault fault, int64_t which)
      : device_(std::move(device)), compute_(device_->create_stream()), fault_(fault), which_(which) {}

  Stream compute_stream() const { return compute_; }
  bool planted() const { return planted_; }

  const char* name() const override { return device_->name(); }
  MemoryInfo memory_info() const override { return device_->memory_info(); }
  Stream create_stream() override { return device_->create_stream(); }
  void destroy_stream(Stream stream) noexcept override { device_->destroy_stream(stream); }
  Event create_event() override { return device_->create_event(); }
  void destroy_event(Event event) noexcept override { device_->destroy_event(event); }
  bool query(Event event) override { return !latest_.contains(event) || device_->query(latest_[event]); }
  void register_host(void* pointer, size_t bytes) override { device_->register_host(pointer, bytes); }
  void unregister_host(void* pointer) noexcept override { device_->unregister_host(pointer); }

  void record(Event event, Stream stream) override {
    const Event record = latest_[event] = device_->create_event();
    device_->record(record, stream);
    recorded_at_[record] = stream == compute_ ? num_kernels_ : num_copies_;
  }
  void stream_wait(Stream stream, Event event) override {
    if (latest_.contains(event)) (stream == compute_ ? kept_for_compute_ : kept_for_copies_).push_back(latest_[event]);
  }
  void synchronize(Event event) override {
    if (!latest_.contains(event)) return;
    device_->synchronize(latest_[event]);
    kernels_before_copies_ = std::max(kernels_before_copies_, recorded_at_[latest_[event]]);
  }
  void copy_async(void* dst, const void* src, int64_t bytes, Stream stream) override {
    if (last_read_[dst] > kernels_before_copies_) {
      make(kept_for_copies_, stream, Fault::early_reuse, kernels_before_copies_);
    }
    device_->copy_async(dst, src, bytes, stream);
    copied_by_[dst] = ++num_copies_;
  }
  // A kernel is about to be launched on the compute stream that reads the slot.
  void read(const void* slot) {
    if (copied_by_[slot] > copies_before_kernels_) {
      make(kept_for_compute_, compute_, Fault::missing_wait, copies_before_kernels_);
    }
    last_read_[slot] = ++num_kernels_;
  }

 private:
  void make(std::vector<Event>& waits, Stream stream, Fault kind, int64_t& seen) {
    if (waits.empty()) return;  // forgotten for an earlier page
    if (fault_ == kind && which_-- == 0) {
      planted_ = true;
    } else {
      for (Event event : waits) {
        device_->stream_wait(stream, event);
        seen = std::max(seen, recorded_at_[event]);
      }
    }
    waits.clear();
  }

  const std::shared_ptr<VirtualDevice> device_;
  const Stream compute_;
  const Fault fault_;
  int64_t which_;
  bool planted_ = false;
  std::vector<Event> kept_for_compute_, kept_for_copies_;
  int64_t num_copies_ = 0, num_kernels_ = 0;
  int64_t copies_before_kernels_ = 0, kernels_before_copies_ = 0;  // up to which number the other stream comes behind
  std::map<const void*, int64_t> copied_by_, last_read_;           // by slot: number of its latest copy, kernel
  std::map<Event, Event> latest_;                                  // the pager's -> its latest record
  std::map<Event, int64_t> recorded_at_;                           // by record
};

}  // namespace usaf

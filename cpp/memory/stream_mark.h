// Places on a device's streams, to wait for: an event and where it was recorded last. One mark stands for everything
// that was queued on its stream before it, so all slots that a batch of copies filled, or a group of experts used,
// share one.
#pragma once
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../device_api.h"

namespace usaf {

struct StreamMark {
  Device::Event event;
  Device::Stream stream;                          // on which it was recorded
  std::optional<Device::Stream> awaited_by = {};  // the latest stream that comes behind it
  bool is_awaited_by(Device::Stream other) const { return other == stream || awaited_by == other; }
};

using SharedMark = std::shared_ptr<StreamMark>;  // null: of what never happened, which counts as done

// Makes marks, and records the events of those that nobody holds any more anew: waits that were asked for before are
// for the record of their time. Its marks die before it does, and like it under their owner's lock.
class StreamMarks {
 public:
  explicit StreamMarks(std::shared_ptr<Device> device) : device_(std::move(device)) {}
  ~StreamMarks() {
    for (Device::Event event : events_) {
      if (event) device_->destroy_event(event);
    }
  }
  StreamMarks(const StreamMarks&) = delete;
  StreamMarks& operator=(const StreamMarks&) = delete;

  // Behind what `stream` was given so far.
  SharedMark record(Device::Stream stream) {
    if (spare_.empty()) {
      events_.push_back(nullptr);
      spare_.reserve(events_.capacity());  // room for all: no end of a mark throws
      events_.back() = device_->create_event();
      spare_.push_back(events_.back());
    }
    const Device::Event event = spare_.back();
    device_->record(event, stream);
    spare_.pop_back();
    return SharedMark(new StreamMark{event, stream}, [this](StreamMark* last) {
      spare_.push_back(last->event);
      delete last;
    });
  }

 private:
  const std::shared_ptr<Device> device_;
  std::vector<Device::Event> events_, spare_;
};

}  // namespace usaf

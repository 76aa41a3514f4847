// Memory that one user after another writes, on whatever stream each of them works.
#pragma once
#include <memory>
#include <utility>

#include "../device_api.h"
#include "../errors.h"

namespace usaf {

class StreamOrder {
 public:
  explicit StreamOrder(std::shared_ptr<Device> device) : device_(std::move(device)), done_(device_->create_event()) {}
  ~StreamOrder() { device_->destroy_event(done_); }
  StreamOrder(const StreamOrder&) = delete;
  StreamOrder& operator=(const StreamOrder&) = delete;

  // What is launched on `stream` while this lives comes behind what former uses launched on other streams.
  class Use {
   public:
    Use(StreamOrder& order, Device::Stream stream) : order_(order), stream_(stream) {
      if (order.latest_ != stream) order.device_->stream_wait(stream, order.done_);
    }
    ~Use() {
      order_.latest_ = stream_;
      try {
        order_.device_->record(order_.done_, stream_);
      } catch (const DeviceError&) {  // the device is lost; whoever uses it next is told
      }
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    StreamOrder& order_;
    Device::Stream stream_;
  };

 private:
  std::shared_ptr<Device> device_;
  Device::Event done_;
  Device::Stream latest_ = nullptr;
};

}  // namespace usaf

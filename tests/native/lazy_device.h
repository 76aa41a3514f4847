// A device with no time of its own, for tests: work queues on its streams and runs only when somebody waits for it or
// the test says so, in any order that the streams and events allow. What a wait was forgotten for is read too early.
#pragma once
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "device_api.h"
#include "errors.h"

namespace usaf {

class LazyDevice final : public Device {
 public:
  const char* name() const override { return "lazy"; }
  MemoryInfo memory_info() const override { return {0, 0}; }

  Stream create_stream() override {
    streams_.push_back(std::make_unique<LazyStream>());
    return streams_.back().get();
  }
  void destroy_stream(Stream stream) noexcept override {
    std::erase_if(streams_, [&](const auto& own) { return own.get() == stream; });
  }
  Event create_event() override {
    events_.push_back(std::make_unique<LazyEvent>());
    return events_.back().get();
  }
  void destroy_event(Event event) noexcept override {
    std::erase_if(events_, [&](const auto& own) { return own.get() == event; });
  }

  void record(Event event, Stream stream) override {
    auto* target = static_cast<LazyEvent*>(event);
    target->stream = static_cast<LazyStream*>(stream);
    const int64_t generation = ++target->recorded;
    push(stream, {[=] { target->completed = generation; }});
  }
  void stream_wait(Stream stream, Event event) override {
    auto* target = static_cast<LazyEvent*>(event);
    push(stream, {[] {}, target, target->recorded});
  }
  bool query(Event event) override {
    auto* target = static_cast<LazyEvent*>(event);
    return target->completed >= target->recorded;
  }
  void synchronize(Event event) override {
    auto* target = static_cast<LazyEvent*>(event);
    while (!query(event)) advance(*target->stream);
  }
  void copy_async(void* dst, const void* src, int64_t bytes, Stream stream) override {
    push(stream, {[=] { std::memcpy(dst, src, static_cast<size_t>(bytes)); }});
  }
  void register_host(void*, size_t) override {}
  void unregister_host(void*) noexcept override {}

  // A kernel.
  void launch(Stream stream, std::function<void()> work) { push(stream, {std::move(work)}); }

  // Run up to `count` operations, each the first of a stream drawn among those that may go on. The number that ran.
  int64_t run_some(int64_t count, uint64_t seed) {
    std::mt19937_64 draw(seed);
    int64_t done = 0;
    for (; done < count; ++done) {
      std::vector<LazyStream*> ready;
      for (const auto& stream : streams_) {
        if (!stream->operations.empty() && stream->operations.front().ready()) ready.push_back(stream.get());
      }
      if (ready.empty()) break;
      advance(*ready[draw() % ready.size()]);
    }
    return done;
  }

  int64_t num_queued() const {
    size_t count = 0;
    for (const auto& stream : streams_) count += stream->operations.size();
    return static_cast<int64_t>(count);
  }

 private:
  struct LazyStream;
  struct LazyEvent {
    LazyStream* stream = nullptr;
    int64_t recorded = 0, completed = 0;
  };
  struct Operation {
    std::function<void()> work;
    LazyEvent* event = nullptr;  // waits for this generation of it
    int64_t generation = 0;
    bool ready() const { return event == nullptr || event->completed >= generation; }
  };
  struct LazyStream {
    std::deque<Operation> operations;
  };

  void push(Stream stream, Operation operation) {
    if (stream == nullptr) throw DeviceError("lazy: the null stream is not a stream here");
    static_cast<LazyStream*>(stream)->operations.push_back(std::move(operation));
  }

  // Run the stream's first operation, and before it what it waits for.
  void advance(LazyStream& stream) {
    if (stream.operations.empty()) throw DeviceError("lazy: nothing queued would complete the event");
    while (!stream.operations.front().ready()) advance(*stream.operations.front().event->stream);
    const Operation operation = std::move(stream.operations.front());
    stream.operations.pop_front();
    operation.work();
  }

  std::vector<std::unique_ptr<LazyStream>> streams_;
  std::vector<std::unique_ptr<LazyEvent>> events_;
};

}  // namespace usaf

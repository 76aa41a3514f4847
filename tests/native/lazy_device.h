// A device with no time of its own, for tests: work queues on its streams and runs only when somebody waits for it or
// the test says so, in any order that the streams and events allow. What a wait was forgotten for is read too early.
#pragma once
#include <algorithm>
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
    const auto record = std::make_shared<Record>(Record{static_cast<LazyStream*>(stream)});
    static_cast<LazyEvent*>(event)->latest = record;
    push(stream, {[=] { record->done = true; }});
  }
  void stream_wait(Stream stream, Event event) override {
    push(stream, {[] {}, static_cast<LazyEvent*>(event)->latest});
  }
  bool query(Event event) override {
    const auto& record = static_cast<LazyEvent*>(event)->latest;
    return record == nullptr || record->done;
  }
  void synchronize(Event event) override {
    while (!query(event)) advance(*static_cast<LazyEvent*>(event)->latest->stream);
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
  struct Record {
    LazyStream* stream;
    bool done = false;
  };
  struct LazyEvent {
    std::shared_ptr<Record> latest = nullptr;  // null: never recorded
  };
  struct Operation {
    std::function<void()> work;
    std::shared_ptr<Record> awaited = nullptr;
    bool ready() const { return awaited == nullptr || awaited->done; }
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
    while (!stream.operations.front().ready()) advance(*stream.operations.front().awaited->stream);
    const Operation operation = std::move(stream.operations.front());
    stream.operations.pop_front();
    operation.work();
  }

  std::vector<std::unique_ptr<LazyStream>> streams_;
  std::vector<std::unique_ptr<LazyEvent>> events_;
};

}  // namespace usaf

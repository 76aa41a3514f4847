// A device on a clock of its own, for a card that is not here: streams, events and a copy engine whose work takes given
// times, and a host that pays for each call. It gives a timeline, and the time that each side waited.
//
// Time proves nothing about a missing wait, which may be hidden by good luck. So what a copy or a kernel does to memory
// does not happen at its time but as late, or as early, as the streams and events allow:
//   late copies:  a kernel runs when it is launched, behind only what it must wait for; until then the bytes that a
//                 copy will fill are poison. What was not waited for is read as poison.
//   early copies: a copy runs when it is queued, behind only what it must wait for; kernels run when something must
//                 wait for them. A slot that is refilled too early has lost what a kernel was to read.
// A slot may be refilled too early and then again with the first page: copies are counted, too (copies_to).
#pragma once
#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "device_api.h"
#include "errors.h"

namespace usaf {

struct VirtualRates {
  double copy_seconds = 0;   // of each copy of a page
  double call_seconds = 0;   // host time of a launch or copy
  double event_seconds = 0;  // host time of a record, or of a stream's wait
  double wake_seconds = 0;   // from an event until the host that waits for it goes on
  int64_t queue_depth = 1;   // copies or kernels on a stream that have not begun; then the host waits for room
};

enum class Effects { late_copies, early_copies };

inline constexpr uint8_t kPoison = 0xA5;

class VirtualDevice final : public Device {
 public:
  struct Span {
    const void* copied_from;  // null: kernels
    int64_t label;            // of kernels
    double start, end;
  };
  struct Totals {
    double copy_seconds = 0, kernel_seconds = 0;
    double stall_seconds = 0;   // kernels that nothing but an event kept from starting
    double launch_seconds = 0;  // kernels that nothing but the host kept from starting
    int64_t host_waits = 0;
    double host_wait_seconds = 0;
    int64_t event_calls = 0;  // records, and waits of streams
  };

  VirtualDevice(const VirtualRates& rates, Effects effects) : rates_(rates), effects_(effects) {}

  const char* name() const override { return "virtual"; }
  MemoryInfo memory_info() const override { return {0, 0}; }

  Stream create_stream() override {
    streams_.push_back(std::make_unique<VirtualStream>());
    return streams_.back().get();
  }
  void destroy_stream(Stream stream) noexcept override {
    std::erase_if(streams_, [&](const auto& own) { return own.get() == stream; });
  }
  Event create_event() override {
    events_.push_back(std::make_unique<VirtualEvent>());
    return events_.back().get();
  }
  void destroy_event(Event event) noexcept override {
    std::erase_if(events_, [&](const auto& own) { return own.get() == event; });
  }

  void record(Event event, Stream stream) override {
    VirtualStream& on = call_on(stream, rates_.event_seconds);
    ++totals_.event_calls;
    const auto record = std::make_shared<Record>(Record{&on, std::max({on.end, on.blocked_until, now_})});
    on.operations.push_back({[=] { record->done = true; }});
    static_cast<VirtualEvent*>(event)->latest = record;
  }
  void stream_wait(Stream stream, Event event) override {
    VirtualStream& on = call_on(stream, rates_.event_seconds);
    ++totals_.event_calls;
    const auto& record = static_cast<VirtualEvent*>(event)->latest;
    if (record == nullptr) return;  // never recorded: done
    on.blocked_until = std::max(on.blocked_until, record->time);
    on.operations.push_back({[] {}, record});
  }
  bool query(Event event) override {
    now_ += rates_.event_seconds;
    const auto& record = static_cast<VirtualEvent*>(event)->latest;
    return record == nullptr || record->time <= now_;
  }
  void synchronize(Event event) override {
    const auto& record = static_cast<VirtualEvent*>(event)->latest;
    if (record == nullptr) return;
    const double before = now_;
    now_ = std::max(now_, record->time) + rates_.wake_seconds;
    ++totals_.host_waits;
    totals_.host_wait_seconds += now_ - before;
    run_until(record);
  }
  void copy_async(void* dst, const void* src, int64_t bytes, Stream stream) override {
    VirtualStream& on = call_on(stream, rates_.call_seconds);
    engine_free_ = begin(on, 1, engine_free_) + rates_.copy_seconds;
    on.end = engine_free_;
    totals_.copy_seconds += rates_.copy_seconds;
    spans_.push_back({src, 0, on.end - rates_.copy_seconds, on.end});
    const auto size = static_cast<size_t>(bytes);
    if (effects_ == Effects::late_copies) std::memset(dst, kPoison, size);
    Copies& to = copies_[dst];
    ++to.queued;
    on.operations.push_back({[=, &to] {
      std::memcpy(dst, src, size);
      ++to.done;
    }});
    if (effects_ == Effects::early_copies) run_all(on);
  }
  void register_host(void*, size_t) override {}
  void unregister_host(void*) noexcept override {}

  // A kernel, or `calls` kernels in a row, that do `work`.
  void launch(Stream stream, double seconds, int64_t calls, int64_t label, std::function<void()> work) {
    VirtualStream& on = call_on(stream, rates_.call_seconds);
    const double idle_from = on.end, blocked_until = on.blocked_until, launched = now_;
    const double start = begin(on, calls, 0);
    const double stalled = std::max(0.0, blocked_until - std::max(idle_from, launched));
    totals_.stall_seconds += stalled;
    totals_.launch_seconds += start - idle_from - stalled;
    totals_.kernel_seconds += seconds;
    // The later of these calls come while the first ones run.
    now_ += static_cast<double>(calls - 1) * rates_.call_seconds;
    on.end = std::max(start + seconds, now_);
    totals_.launch_seconds += on.end - start - seconds;
    spans_.push_back({nullptr, label, start, on.end});
    on.operations.push_back({std::move(work)});
    if (effects_ == Effects::late_copies) run_all(on);
  }

  // Everything that is queued, in some allowed order.
  void finish() {
    for (const auto& stream : streams_) run_all(*stream);
  }
  double now() const { return now_; }
  // When the work that is queued on `stream` ends.
  double end_of(Stream stream) const { return static_cast<VirtualStream*>(stream)->end; }
  const Totals& totals() const { return totals_; }
  const std::vector<Span>& spans() const { return spans_; }
  void clear_spans() { spans_.clear(); }
  struct Copies {
    int64_t queued = 0, done = 0;
  };
  const Copies& copies_to(const void* slot) { return copies_[slot]; }

 private:
  struct VirtualStream;
  struct Record {
    VirtualStream* stream;
    double time;
    bool done = false;
  };
  struct VirtualEvent {
    std::shared_ptr<Record> latest = nullptr;  // null: never recorded
  };
  struct Operation {
    std::function<void()> work;
    std::shared_ptr<Record> awaited = nullptr;
  };
  struct VirtualStream {
    double end = 0;                                    // of its latest copy or kernel
    double blocked_until = 0;                          // by events
    std::deque<std::pair<double, int64_t>> not_begun;  // start and number of calls, as far as the host may know
    int64_t num_not_begun = 0;
    std::deque<Operation> operations;  // that have not happened to memory yet
  };

  // The host calls; first it waits for room in the stream's queue.
  VirtualStream& call_on(Stream stream, double host_seconds) {
    if (stream == nullptr) throw DeviceError("virtual: the null stream is not a stream here");
    auto& on = *static_cast<VirtualStream*>(stream);
    now_ += host_seconds;
    while (!on.not_begun.empty() && (on.not_begun.front().first <= now_ || on.num_not_begun >= rates_.queue_depth)) {
      now_ = std::max(now_, on.not_begun.front().first);
      on.num_not_begun -= on.not_begun.front().second;
      on.not_begun.pop_front();
    }
    return on;
  }

  // When the copy or kernel that is queued now starts, on an engine that is free from `free` on.
  double begin(VirtualStream& on, int64_t calls, double free) {
    const double start = std::max({on.end, on.blocked_until, now_, free});
    on.not_begun.emplace_back(start, calls);
    on.num_not_begun += calls;
    return start;
  }

  void run_next(VirtualStream& stream) {
    if (stream.operations.empty()) throw DeviceError("virtual: nothing queued would complete the event");
    const Operation operation = std::move(stream.operations.front());
    stream.operations.pop_front();
    if (operation.awaited != nullptr) run_until(operation.awaited);
    operation.work();
  }
  void run_until(const std::shared_ptr<Record>& record) {
    while (!record->done) run_next(*record->stream);
  }
  void run_all(VirtualStream& stream) {
    while (!stream.operations.empty()) run_next(stream);
  }

  const VirtualRates rates_;
  const Effects effects_;
  double now_ = 0;          // of the host
  double engine_free_ = 0;  // from when on the copy engine is
  Totals totals_;
  std::vector<Span> spans_;
  std::map<const void*, Copies> copies_;  // by slot
  std::vector<std::unique_ptr<VirtualStream>> streams_;
  std::vector<std::unique_ptr<VirtualEvent>> events_;
};

}  // namespace usaf

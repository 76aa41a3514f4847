// The CPU as a Device: each created stream is a worker thread with a FIFO of operations; the null stream is the calling
// thread. Same ordering rules as a GPU's streams and events, so the pager above it cannot tell the difference.
#include <unistd.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>

#include "../device_api.h"
#include "../errors.h"

namespace usaf {
namespace {

// Generation g is the g-th record of the event; a wait is for the latest generation at the time it was asked for.
class CpuEvent {
 public:
  int64_t begin_generation() {
    std::lock_guard lock(mutex_);
    return ++recorded_;
  }

  int64_t latest_generation() const {
    std::lock_guard lock(mutex_);
    return recorded_;
  }

  bool done(int64_t generation) const {
    std::lock_guard lock(mutex_);
    return completed_ >= generation;
  }

  // `failure`: why an operation before the record failed, or empty.
  void complete(int64_t generation, std::string failure) {
    {
      std::lock_guard lock(mutex_);
      if (generation <= completed_) return;
      completed_ = generation;
      failure_ = std::move(failure);
    }
    changed_.notify_all();
  }

  void wait(int64_t generation) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return completed_ >= generation; });
    if (!failure_.empty()) throw DeviceError(failure_);
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int64_t recorded_ = 0, completed_ = 0;
  std::string failure_;
};

class CpuStream {
 public:
  CpuStream() : worker_([this] { run(); }) {}

  // Runs what is queued first. An operation only waits for records that were queued before it, so this ends.
  ~CpuStream() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_one();
    worker_.join();
  }

  void copy(void* dst, const void* src, int64_t bytes) {
    push([=] {
      if (dst == nullptr || src == nullptr)
        throw DeviceError("cpu copy of " + std::to_string(bytes) + " bytes: null pointer");
      std::memcpy(dst, src, static_cast<size_t>(bytes));
    });
  }

  void wait(std::shared_ptr<CpuEvent> event, int64_t generation) {
    push([event = std::move(event), generation] { event->wait(generation); });
  }

  void record(std::shared_ptr<CpuEvent> event, int64_t generation) {
    push([this, event = std::move(event), generation] { event->complete(generation, std::exchange(failure_, {})); });
  }

 private:
  void push(std::function<void()> operation) {
    {
      std::lock_guard lock(mutex_);
      operations_.push_back(std::move(operation));
    }
    changed_.notify_one();
  }

  void run() {
    for (;;) {
      std::function<void()> operation;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return stopping_ || !operations_.empty(); });
        if (operations_.empty()) return;
        operation = std::move(operations_.front());
        operations_.pop_front();
      }
      try {
        operation();
      } catch (const std::exception& error) {
        if (failure_.empty()) failure_ = error.what();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> operations_;
  bool stopping_ = false;
  std::string failure_;  // the worker's own: the first failure since the last record, which carries it to the host
  std::thread worker_;   // last: it starts when everything else is there
};

class CpuDevice final : public Device {
 public:
  const char* name() const override { return "cpu"; }

  MemoryInfo memory_info() const override {
    const int64_t page = sysconf(_SC_PAGESIZE), free = sysconf(_SC_AVPHYS_PAGES), total = sysconf(_SC_PHYS_PAGES);
    if (page < 0 || free < 0 || total < 0) throw DeviceError("cpu: sysconf does not tell the size of the memory");
    return {free * page, total * page};
  }

  Stream create_stream() override {
    auto stream = std::make_unique<CpuStream>();
    std::lock_guard lock(mutex_);
    return streams_.emplace(stream.get(), std::move(stream)).first->first;
  }

  void destroy_stream(Stream stream) noexcept override {
    std::unique_ptr<CpuStream> last;  // joined outside the lock
    std::lock_guard lock(mutex_);
    if (auto found = streams_.find(stream); found != streams_.end()) {
      last = std::move(found->second);
      streams_.erase(found);
    }
  }

  Event create_event() override {
    auto event = std::make_shared<CpuEvent>();
    std::lock_guard lock(mutex_);
    return events_.emplace(event.get(), std::move(event)).first->first;
  }

  // Operations already queued keep the event alive.
  void destroy_event(Event event) noexcept override {
    std::lock_guard lock(mutex_);
    events_.erase(event);
  }

  void record(Event event, Stream stream) override {
    const auto target = find_event(event);
    if (stream == nullptr) {
      target->complete(target->begin_generation(), {});
    } else {
      CpuStream& queue = find_stream(stream);
      queue.record(target, target->begin_generation());
    }
  }

  void stream_wait(Stream stream, Event event) override {
    const auto target = find_event(event);
    const int64_t generation = target->latest_generation();
    if (stream == nullptr) {
      target->wait(generation);
    } else {
      find_stream(stream).wait(target, generation);
    }
  }

  bool query(Event event) override {
    const auto target = find_event(event);
    return target->done(target->latest_generation());
  }

  void synchronize(Event event) override {
    const auto target = find_event(event);
    target->wait(target->latest_generation());
  }

  void copy_async(void* dst, const void* src, int64_t bytes, Stream stream) override {
    if (bytes < 0) throw DeviceError("cpu copy: bytes must not be negative, got " + std::to_string(bytes));
    find_stream(stream).copy(dst, src, bytes);
  }

  void register_host(void* pointer, size_t bytes) override {
    if (pointer == nullptr || bytes == 0) throw DeviceError("cpu register_host: expected a pointer and a size above 0");
  }

  void unregister_host(void*) noexcept override {}

 private:
  CpuStream& find_stream(Stream stream) {
    std::lock_guard lock(mutex_);
    const auto found = streams_.find(stream);
    if (found == streams_.end()) throw DeviceError("cpu: not a stream of this device");
    return *found->second;
  }

  std::shared_ptr<CpuEvent> find_event(Event event) {
    std::lock_guard lock(mutex_);
    const auto found = events_.find(event);
    if (found == events_.end()) throw DeviceError("cpu: not an event of this device");
    return found->second;
  }

  std::mutex mutex_;
  std::unordered_map<Event, std::shared_ptr<CpuEvent>> events_;
  std::unordered_map<Stream, std::unique_ptr<CpuStream>> streams_;  // destroyed, and so joined, first
};

}  // namespace

std::shared_ptr<Device> make_cpu_device() { return std::make_shared<CpuDevice>(); }

}  // namespace usaf

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

// One record of an event. A wait is for the record that was the latest when it was asked for, whatever comes later.
class Completion {
 public:
  bool done() const {
    std::lock_guard lock(mutex_);
    return done_;
  }

  // `failure`: why an operation before the record failed, or empty.
  void complete(std::string failure) {
    {
      std::lock_guard lock(mutex_);
      done_ = true;
      failure_ = std::move(failure);
    }
    changed_.notify_all();
  }

  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return done_; });
    if (!failure_.empty()) throw DeviceError(failure_);
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
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

  void wait(std::shared_ptr<Completion> record) {
    push([record = std::move(record)] { record->wait(); });
  }

  void complete(std::shared_ptr<Completion> record) {
    push([this, record = std::move(record)] { record->complete(std::exchange(failure_, {})); });
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

struct CpuEvent {
  std::shared_ptr<Completion> latest;  // null: never recorded
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
    auto event = std::make_unique<CpuEvent>();
    std::lock_guard lock(mutex_);
    return events_.emplace(event.get(), std::move(event)).first->first;
  }

  // Operations already queued keep what they need of it.
  void destroy_event(Event event) noexcept override {
    std::lock_guard lock(mutex_);
    events_.erase(event);
  }

  void record(Event event, Stream stream) override {
    auto record = std::make_shared<Completion>();
    std::lock_guard lock(mutex_);
    CpuEvent& target = find_event(event);
    if (stream == nullptr) {
      record->complete({});
    } else {
      find_stream(stream).complete(record);
    }
    target.latest = std::move(record);
  }

  void stream_wait(Stream stream, Event event) override {
    std::unique_lock lock(mutex_);
    auto record = find_event(event).latest;
    if (stream != nullptr) {
      CpuStream& waiting = find_stream(stream);
      if (record) waiting.wait(std::move(record));
    } else if (record) {
      lock.unlock();
      record->wait();
    }
  }

  bool query(Event event) override {
    std::lock_guard lock(mutex_);
    const auto& record = find_event(event).latest;
    return record == nullptr || record->done();
  }

  void synchronize(Event event) override { stream_wait(nullptr, event); }

  void copy_async(void* dst, const void* src, int64_t bytes, Stream stream) override {
    if (bytes < 0) throw DeviceError("cpu copy: bytes must not be negative, got " + std::to_string(bytes));
    std::lock_guard lock(mutex_);
    find_stream(stream).copy(dst, src, bytes);
  }

  void register_host(void* pointer, size_t bytes) override {
    if (pointer == nullptr || bytes == 0) throw DeviceError("cpu register_host: expected a pointer and a size above 0");
  }

  void unregister_host(void*) noexcept override {}

 private:
  // Both with mutex_ held, which no worker takes.
  CpuStream& find_stream(Stream stream) {
    const auto found = streams_.find(stream);
    if (found == streams_.end()) throw DeviceError("cpu: not a stream of this device");
    return *found->second;
  }

  CpuEvent& find_event(Event event) {
    const auto found = events_.find(event);
    if (found == events_.end()) throw DeviceError("cpu: not an event of this device");
    return *found->second;
  }

  std::mutex mutex_;
  std::unordered_map<Event, std::unique_ptr<CpuEvent>> events_;
  std::unordered_map<Stream, std::unique_ptr<CpuStream>> streams_;  // destroyed, and so joined, first
};

}  // namespace

std::shared_ptr<Device> make_cpu_device() { return std::make_shared<CpuDevice>(); }

}  // namespace usaf

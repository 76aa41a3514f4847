// The CPU as a Device: each created stream is a worker thread with a FIFO of operations; the null stream is the calling
// thread. Same ordering rules as a GPU's streams and events, so the pager above it cannot tell the difference.
//
// Copies share the cores with the kernels, and a kernel's threads wait for each other: a worker that takes a core from
// one of them stops them all. So workers have the lowest priority: they copy on cores that are idle. Where none is,
// whoever waits for a record runs what stands before it himself, and a wait of the null stream with all its threads.
#include <unistd.h>

#ifdef __linux__
#include <sys/resource.h>
#endif

#include <algorithm>
#include <condition_variable>
#include <cstdint>
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
#include "parallel.h"

namespace usaf {
namespace {

class CpuStream;

// One record of an event. A wait is for the record that was the latest when it was asked for, whatever comes later.
class Completion {
 public:
  // `stream`: on which it was recorded; null for the calling thread.
  explicit Completion(const std::shared_ptr<CpuStream>& stream) : stream_(stream) {}

  std::shared_ptr<CpuStream> stream() const { return stream_.lock(); }

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
  const std::weak_ptr<CpuStream> stream_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::string failure_;
};

// Whose time an operation takes: one thread's, or that of all threads which the calling thread's kernels have.
enum class Team { one, all };

void copy_bytes(void* dst, const void* src, int64_t bytes, Team team) {
  constexpr int64_t kPiece = 256 << 10;
  const int64_t piece = team == Team::one ? std::max(bytes, int64_t{1}) : kPiece;
  cpu::parallel_for((bytes + piece - 1) / piece, piece, [&](int64_t i) {
    std::memcpy(static_cast<char*>(dst) + i * piece, static_cast<const char*>(src) + i * piece,
                static_cast<size_t>(std::min(piece, bytes - i * piece)));
  });
}

void lower_priority_of_this_thread() {
#ifdef __linux__
  constexpr int kLowest = 19;
  setpriority(PRIO_PROCESS, 0, kLowest);  // on Linux: of the calling thread. Without it copies are only less polite.
#endif
}

class CpuStream {
 public:
  CpuStream() : worker_([this] { run(); }) {}

  // Runs what is queued first. An operation only waits for records that were queued before it, so this ends.
  ~CpuStream() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    worker_.join();
  }

  // Runs queued operations in the calling thread until `record`, which is queued here, is complete or the rest is being
  // run elsewhere.
  void help(const Completion& record, Team team) {
    std::unique_lock lock(mutex_);
    while (!record.done()) {
      changed_.wait(lock, [&] { return !busy_; });
      if (record.done() || operations_.empty()) return;
      run_next(lock, team);
    }
  }

  void copy(void* dst, const void* src, int64_t bytes) {
    push([=](Team team) {
      if (dst == nullptr || src == nullptr)
        throw DeviceError("cpu copy of " + std::to_string(bytes) + " bytes: null pointer");
      copy_bytes(dst, src, bytes, team);
    });
  }

  void wait(std::shared_ptr<Completion> record) {
    push([record = std::move(record)](Team) { record->wait(); });
  }

  void complete(std::shared_ptr<Completion> record) {
    push([this, record = std::move(record)](Team) { record->complete(std::exchange(failure_, {})); });
  }

 private:
  using Operation = std::function<void(Team)>;

  void push(Operation operation) {
    {
      std::lock_guard lock(mutex_);
      operations_.push_back(std::move(operation));
    }
    changed_.notify_all();
  }

  // Takes the first operation, with the lock held and nothing running; runs it without the lock.
  void run_next(std::unique_lock<std::mutex>& lock, Team team) {
    const Operation operation = std::move(operations_.front());
    operations_.pop_front();
    busy_ = true;
    lock.unlock();
    try {
      operation(team);
    } catch (const std::exception& error) {
      if (failure_.empty()) failure_ = error.what();
    }
    lock.lock();
    busy_ = false;
    changed_.notify_all();
  }

  void run() {
    lower_priority_of_this_thread();
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return !busy_ && (stopping_ || !operations_.empty()); });
      if (operations_.empty()) return;
      run_next(lock, Team::one);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Operation> operations_;
  bool busy_ = false;  // an operation is running, in whichever thread
  bool stopping_ = false;
  std::string
      failure_;         // whoever is busy has it: the first failure since the last record, which carries it to the host
  std::thread worker_;  // last: it starts when everything else is there
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
    auto stream = std::make_shared<CpuStream>();
    std::lock_guard lock(mutex_);
    return streams_.emplace(stream.get(), stream).first->first;
  }

  void destroy_stream(Stream stream) noexcept override {
    std::shared_ptr<CpuStream> last;  // joined outside the lock
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
    std::lock_guard lock(mutex_);
    CpuEvent& target = find_event(event);
    const std::shared_ptr<CpuStream> recorded = stream == nullptr ? nullptr : find_stream(stream);
    auto record = std::make_shared<Completion>(recorded);
    if (recorded) {
      recorded->complete(record);
    } else {
      record->complete({});
    }
    target.latest = std::move(record);
  }

  void stream_wait(Stream stream, Event event) override {
    if (stream == nullptr) return host_wait(event, Team::all);
    std::lock_guard lock(mutex_);
    const std::shared_ptr<CpuStream> waiting = find_stream(stream);
    if (auto record = find_event(event).latest) waiting->wait(std::move(record));
  }

  bool query(Event event) override {
    std::lock_guard lock(mutex_);
    const auto& record = find_event(event).latest;
    return record == nullptr || record->done();
  }

  // May be called by threads that run no kernels.
  void synchronize(Event event) override { host_wait(event, Team::one); }

  void copy_async(void* dst, const void* src, int64_t bytes, Stream stream) override {
    if (bytes < 0) throw DeviceError("cpu copy: bytes must not be negative, got " + std::to_string(bytes));
    std::lock_guard lock(mutex_);
    find_stream(stream)->copy(dst, src, bytes);
  }

  void register_host(void* pointer, size_t bytes) override {
    if (pointer == nullptr || bytes == 0) throw DeviceError("cpu register_host: expected a pointer and a size above 0");
  }

  void unregister_host(void*) noexcept override {}

 private:
  void host_wait(Event event, Team team) {
    std::shared_ptr<Completion> record;
    {
      std::lock_guard lock(mutex_);
      record = find_event(event).latest;
    }
    if (!record) return;
    if (const auto stream = record->stream()) stream->help(*record, team);
    record->wait();
  }

  // Both with mutex_ held, which no worker takes.
  std::shared_ptr<CpuStream> find_stream(Stream stream) {
    const auto found = streams_.find(stream);
    if (found == streams_.end()) throw DeviceError("cpu: not a stream of this device");
    return found->second;
  }

  CpuEvent& find_event(Event event) {
    const auto found = events_.find(event);
    if (found == events_.end()) throw DeviceError("cpu: not an event of this device");
    return *found->second;
  }

  std::mutex mutex_;
  std::unordered_map<Event, std::unique_ptr<CpuEvent>> events_;
  std::unordered_map<Stream, std::shared_ptr<CpuStream>> streams_;  // destroyed, and so joined, first
};

}  // namespace

std::shared_ptr<Device> make_cpu_device() { return std::make_shared<CpuDevice>(); }

}  // namespace usaf

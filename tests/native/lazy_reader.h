// A PageReader without threads, for tests: reads happen only when somebody waits for one or the test says so. A read
// that has begun leaves poison in its buffer until it ends. Two faults can be planted, to see that tests notice them.
#pragma once
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <utility>

#include "memory/page_reader.h"

namespace usaf {

enum class ReadFault : int32_t {
  none = 0,
  ignores_copies = 1,  // begins although a copy out of the buffer is still to come
  ends_early = 2,      // reports the page before it is there
};

class LazyReader final : public PageReader {
 public:
  LazyReader(std::shared_ptr<Device> device, ThreadedPageReader::ReadPage read_page, int64_t page_bytes,
             ReadFault fault)
      : device_(std::move(device)), read_page_(std::move(read_page)), page_bytes_(page_bytes), fault_(fault) {}

  void start(std::mutex& mutex, Finished finished) override {
    mutex_ = &mutex;
    finished_ = std::move(finished);
  }
  void submit(const PageRead& read) override { queued_.push_back(read); }
  void await(std::unique_lock<std::mutex>&) override {
    if (begun_.empty()) begin();
    end(0);
  }
  void stop() noexcept override {
    queued_.clear();
    begun_.clear();
  }

  // Begin or end up to `count` reads: they begin in order, and end in any. The number of those steps.
  int64_t run_some(int64_t count, uint64_t seed) {
    const std::lock_guard lock(*mutex_);
    std::mt19937_64 draw(seed);
    int64_t done = 0;
    for (; done < count && !(queued_.empty() && begun_.empty()); ++done) {
      if (begun_.empty() || (!queued_.empty() && begun_.size() < kThreads && draw() % 2 == 0)) {
        begin();
      } else {
        end(draw() % begun_.size());
      }
    }
    return done;
  }

 private:
  static constexpr size_t kThreads = 3;

  void begin() {
    if (queued_.empty()) throw std::logic_error("lazy reader: no read is under way, nothing would end the wait");
    const PageRead read = queued_.front();
    queued_.pop_front();
    if (read.busy != nullptr && fault_ != ReadFault::ignores_copies) device_->synchronize(read.busy);
    std::memset(read.buffer, 0xFF, static_cast<size_t>(page_bytes_));
    begun_.push_back(read);
    if (fault_ == ReadFault::ends_early) finished_(read.buffer_index, nullptr);
  }

  void end(size_t which) {
    const PageRead read = begun_[which];
    begun_.erase(begun_.begin() + static_cast<std::ptrdiff_t>(which));
    std::exception_ptr error;
    try {
      read_page_(read.page, read.buffer);
    } catch (...) {
      error = std::current_exception();
    }
    if (fault_ != ReadFault::ends_early) finished_(read.buffer_index, error);
  }

  std::shared_ptr<Device> device_;
  ThreadedPageReader::ReadPage read_page_;
  int64_t page_bytes_;
  ReadFault fault_;
  std::mutex* mutex_ = nullptr;
  Finished finished_;
  std::deque<PageRead> queued_, begun_;
};

}  // namespace usaf

// Reads pages from disk into host buffers beside the threads that compute.
//
// The reader shares one mutex with its owner (the pager): `finished` is called with it held, and await() gives it up.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../device_api.h"

namespace usaf {

struct PageRead {
  int64_t buffer_index;  // the ring's own number, handed back when the read is over
  int64_t page;
  uint8_t* buffer;
  Device::Event busy;  // of the latest copy out of the buffer: the read begins behind it
};

class PageReader {
 public:
  using Finished = std::function<void(int64_t buffer_index, std::exception_ptr error)>;

  virtual ~PageReader() = default;

  // Once, before the first submit().
  virtual void start(std::mutex& mutex, Finished finished) = 0;
  // Reads begin in the order in which they are submitted. With the mutex held; never blocks.
  virtual void submit(const PageRead& read) = 0;
  // With the mutex held, while a read is under way: give it up until `finished` was called. May return early.
  virtual void await(std::unique_lock<std::mutex>& lock) = 0;
  // Without the mutex: drop what has not begun and wait for what has. No `finished` comes after this.
  virtual void stop() noexcept = 0;
};

class ThreadedPageReader final : public PageReader {
 public:
  using ReadPage = std::function<void(int64_t page, uint8_t* buffer)>;

  // `read_page`: called from `num_threads` threads.
  ThreadedPageReader(std::shared_ptr<Device> device, ReadPage read_page, int64_t num_threads);
  ~ThreadedPageReader() override { stop(); }

  void start(std::mutex& mutex, Finished finished) override;
  void submit(const PageRead& read) override;
  void await(std::unique_lock<std::mutex>& lock) override { progress_.wait(lock); }
  void stop() noexcept override;

 private:
  void run();
  std::exception_ptr perform(const PageRead& read) const noexcept;

  std::shared_ptr<Device> device_;
  ReadPage read_page_;
  int64_t num_threads_;
  Finished finished_;
  std::mutex* mutex_ = nullptr;  // guards what follows
  std::condition_variable work_, progress_;
  std::deque<PageRead> queue_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace usaf

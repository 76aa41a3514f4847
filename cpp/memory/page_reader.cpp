#include "page_reader.h"

#include <pthread.h>

#include <csignal>
#include <utility>

#include "../errors.h"

namespace usaf {

ThreadedPageReader::ThreadedPageReader(std::shared_ptr<Device> device, ReadPage read_page, int64_t num_threads)
    : device_(std::move(device)), read_page_(std::move(read_page)), num_threads_(num_threads) {}

void ThreadedPageReader::start(std::mutex& mutex, Finished finished) {
  mutex_ = &mutex;
  finished_ = std::move(finished);
  // Signals are the main thread's: new threads inherit the mask.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int64_t i = 0; i < num_threads_; ++i) threads_.emplace_back([this] { run(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    stop();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void ThreadedPageReader::submit(const PageRead& read) {
  queue_.push_back(read);
  work_.notify_one();
}

void ThreadedPageReader::stop() noexcept {
  if (mutex_ == nullptr) return;
  {
    const std::lock_guard lock(*mutex_);
    stopping_ = true;
    queue_.clear();
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

std::exception_ptr ThreadedPageReader::perform(const PageRead& read) const noexcept {
  try {
    device_->enter_thread();  // each time, which costs next to nothing, so that a read tells if it fails
    // If this fails the copy may still run: no read. A copy that failed is told to whoever waits for its page.
    if (read.busy != nullptr) device_->synchronize(read.busy);
    read_page_(read.page, read.buffer);
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

void ThreadedPageReader::run() {
  std::unique_lock lock(*mutex_);
  for (;;) {
    work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    const PageRead read = queue_.front();
    queue_.pop_front();
    lock.unlock();
    const std::exception_ptr error = perform(read);
    lock.lock();
    if (stopping_) return;
    finished_(read.buffer_index, error);
    progress_.notify_all();
  }
}

}  // namespace usaf

// What the expert pager needs of a device: streams, events, asynchronous copies, pinned registration. No torch.
//
// One file a backend: cpp/cpu/device.cpp (copies on a worker thread), cuda/device.cu, hip/device.hip; tests/native has
// a virtual-time device. Handles are opaque and belong to the device that made them. Every call throws DeviceError on
// failure, and may be made by any thread.
#pragma once
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace usaf {

struct MemoryInfo {
  int64_t free_bytes, total_bytes;
};

class Device {
 public:
  using Stream = void*;  // null is never a copy stream; on a GPU it is the default stream
  using Event = void*;

  virtual ~Device() = default;
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  virtual const char* name() const = 0;  // "cpu", "cuda", "hip"
  virtual MemoryInfo memory_info() const = 0;

  virtual Stream create_stream() = 0;
  virtual void destroy_stream(Stream stream) noexcept = 0;
  virtual Event create_event() = 0;
  virtual void destroy_event(Event event) noexcept = 0;

  // `stream` may be a created stream or the caller's compute stream (a native handle; null on the CPU, where the
  // compute stream is the calling thread itself).
  virtual void record(Event event, Stream stream) = 0;
  virtual void stream_wait(Stream stream, Event event) = 0;  // later work on `stream` waits for `event`
  virtual bool query(Event event) = 0;                       // done? An event never recorded counts as done.
  virtual void synchronize(Event event) = 0;                 // the host waits
  // Either end may be host memory. Unless that is registered, the host may wait for the copy.
  virtual void copy_async(void* dst, const void* src, int64_t bytes, Stream stream) = 0;

  // A thread of this library's own that is about to make calls. Those of others keep the device that is theirs.
  virtual void enter_thread() {}

  // Host memory, whole pages of the system's, that asynchronous copies go to and from (host_registration.h).
  virtual void register_host(void* pointer, size_t bytes) = 0;
  virtual void unregister_host(void* pointer) noexcept = 0;

  // Is this a child of fork()? There the threads behind the device are missing, and so is registered memory, at whose
  // addresses something else may lie: nothing can be waited for, and nothing is given back.
  bool is_left_behind() const { return getpid() != process_; }

  // How often synchronize() made the host wait for a GPU.
  int64_t host_waits() const { return host_waits_; }

 protected:
  void count_host_wait() { ++host_waits_; }

 private:
  std::atomic<int64_t> host_waits_ = 0;
  const pid_t process_ = getpid();
};

std::shared_ptr<Device> make_cpu_device();

// In a build with GPU kernels: GPU number `index`. Throws std::invalid_argument where there is none of that number.
std::shared_ptr<Device> make_gpu_device(int index);

}  // namespace usaf

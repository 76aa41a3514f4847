// An AMD GPU as the pager sees it (device_api.h), over the HIP runtime.
//
// Copy streams do not block the null stream, and events carry no times: they order, and nothing else. HIP keeps the
// current device in the thread: a call makes this one current and puts back what was, but for threads of the pager's
// own, which choose it for good (enter_thread). Registered memory, not hipHostMalloc's: amdgpu caps what a driver
// allocates for the host well below what it lets be registered.
#include <hip/hip_runtime.h>

#include <stdexcept>
#include <string>

#include "device_api.h"
#include "errors.h"

namespace usaf {
namespace {

// What an error leaves behind is taken away: it is told by an exception or not at all, and must not turn up at the
// next launch of a kernel.
void forget(hipError_t error) {
  if (error != hipSuccess) static_cast<void>(hipGetLastError());
}

void check(hipError_t error, const char* what) {
  forget(error);
  if (error != hipSuccess) throw DeviceError(std::string("HIP ") + what + ": " + hipGetErrorString(error));
}

class Current {
 public:
  explicit Current(int index) {
    check(hipGetDevice(&before_), "current device");
    if (before_ == index) return;
    check(hipSetDevice(index), "choice of device");
    changed_ = true;
  }
  ~Current() {
    if (changed_) forget(hipSetDevice(before_));
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

class HipDevice final : public Device {
 public:
  explicit HipDevice(int index) : index_(index) {}

  const char* name() const override { return "hip"; }

  MemoryInfo memory_info() const override {
    const Current current(index_);
    size_t free = 0, total = 0;
    check(hipMemGetInfo(&free, &total), "memory info");
    return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
  }

  Stream create_stream() override {
    const Current current(index_);
    hipStream_t stream = nullptr;
    check(hipStreamCreateWithFlags(&stream, hipStreamNonBlocking), "stream");
    return stream;
  }
  void destroy_stream(Stream stream) noexcept override {
    destroy([&] { return hipStreamDestroy(static_cast<hipStream_t>(stream)); });
  }

  Event create_event() override {
    const Current current(index_);
    hipEvent_t event = nullptr;
    check(hipEventCreateWithFlags(&event, hipEventDisableTiming), "event");
    return event;
  }
  void destroy_event(Event event) noexcept override {
    destroy([&] { return hipEventDestroy(static_cast<hipEvent_t>(event)); });
  }

  void record(Event event, Stream stream) override {
    const Current current(index_);
    check(hipEventRecord(static_cast<hipEvent_t>(event), static_cast<hipStream_t>(stream)), "event record");
  }
  void stream_wait(Stream stream, Event event) override {
    const Current current(index_);
    check(hipStreamWaitEvent(static_cast<hipStream_t>(stream), static_cast<hipEvent_t>(event), 0), "stream wait");
  }
  bool query(Event event) override {
    const Current current(index_);
    const hipError_t state = hipEventQuery(static_cast<hipEvent_t>(event));
    if (state != hipErrorNotReady) return check(state, "event query"), true;
    forget(state);
    return false;
  }
  void synchronize(Event event) override {
    const Current current(index_);
    count_host_wait();
    check(hipEventSynchronize(static_cast<hipEvent_t>(event)), "event synchronize");
  }
  void copy_async(void* dst, const void* src, int64_t bytes, Stream stream) override {
    const Current current(index_);
    check(hipMemcpyAsync(dst, src, static_cast<size_t>(bytes), hipMemcpyDefault, static_cast<hipStream_t>(stream)),
          "copy");
  }

  void enter_thread() override { check(hipSetDevice(index_), "choice of device"); }

  void register_host(void* pointer, size_t bytes) override {
    const Current current(index_);
    check(hipHostRegister(pointer, bytes, hipHostRegisterPortable), "host memory registration");
  }
  void unregister_host(void* pointer) noexcept override {
    destroy([&] { return hipHostUnregister(pointer); });
  }

 private:
  template <class Call>
  void destroy(const Call& call) noexcept {
    if (is_left_behind()) return;
    try {
      const Current current(index_);
      forget(call());
    } catch (const DeviceError&) {  // the device is lost, and what it had
    }
  }

  const int index_;
};

}  // namespace

std::shared_ptr<Device> make_gpu_device(int index) {
  int count = 0;
  const hipError_t error = hipGetDeviceCount(&count);
  forget(error);
  if (error != hipSuccess || index < 0 || index >= count) {
    const std::string found = error == hipSuccess ? std::to_string(count) : hipGetErrorString(error);
    throw std::invalid_argument("device: expected the number of a HIP GPU, got " + std::to_string(index) +
                                " (found: " + found + ")");
  }
  return std::make_shared<HipDevice>(index);
}

}  // namespace usaf

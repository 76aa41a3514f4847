// An NVIDIA GPU as the pager sees it (device_api.h), over the CUDA runtime.
//
// Copy streams do not block the legacy default stream, and events carry no times: they order, and nothing else. The
// current device belongs to the thread: each call makes this one current and puts back what was. Putting it back makes
// a context on that other device where a caller's thread had none yet, which the pager's own threads are spared: they
// choose the device for good (enter_thread).
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "device_api.h"
#include "errors.h"

namespace usaf {
namespace {

// What an error leaves behind is taken away: it is told by an exception or not at all, and must not turn up at the
// next launch of a kernel.
void forget(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
}

void check(cudaError_t error, const char* what) {
  forget(error);
  if (error != cudaSuccess) throw DeviceError(std::string("CUDA ") + what + ": " + cudaGetErrorString(error));
}

class Current {
 public:
  explicit Current(int index) {
    check(cudaGetDevice(&before_), "current device");
    if (before_ == index) return;
    check(cudaSetDevice(index), "choice of device");
    changed_ = true;
  }
  ~Current() {
    if (changed_) forget(cudaSetDevice(before_));
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index) {}

  const char* name() const override { return "cuda"; }

  MemoryInfo memory_info() const override {
    const Current current(index_);
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "memory info");
    return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
  }

  Stream create_stream() override {
    const Current current(index_);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    return stream;
  }
  void destroy_stream(Stream stream) noexcept override {
    destroy([&] { return cudaStreamDestroy(static_cast<cudaStream_t>(stream)); });
  }

  Event create_event() override {
    const Current current(index_);
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
    return event;
  }
  void destroy_event(Event event) noexcept override {
    destroy([&] { return cudaEventDestroy(static_cast<cudaEvent_t>(event)); });
  }

  void record(Event event, Stream stream) override {
    const Current current(index_);
    check(cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)), "event record");
  }
  void stream_wait(Stream stream, Event event) override {
    const Current current(index_);
    check(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event), 0), "stream wait");
  }
  bool query(Event event) override {
    const Current current(index_);
    const cudaError_t state = cudaEventQuery(static_cast<cudaEvent_t>(event));
    if (state != cudaErrorNotReady) return check(state, "event query"), true;
    forget(state);
    return false;
  }
  void synchronize(Event event) override {
    const Current current(index_);
    count_host_wait();
    check(cudaEventSynchronize(static_cast<cudaEvent_t>(event)), "event synchronize");
  }
  void copy_async(void* dst, const void* src, int64_t bytes, Stream stream) override {
    const Current current(index_);
    check(cudaMemcpyAsync(dst, src, static_cast<size_t>(bytes), cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
          "copy");
  }

  void enter_thread() override { check(cudaSetDevice(index_), "choice of device"); }

  void register_host(void* pointer, size_t bytes) override {
    const Current current(index_);
    check(cudaHostRegister(pointer, bytes, cudaHostRegisterPortable), "host memory registration");
  }
  void unregister_host(void* pointer) noexcept override {
    destroy([&] { return cudaHostUnregister(pointer); });
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
  const cudaError_t error = cudaGetDeviceCount(&count);
  forget(error);
  if (error != cudaSuccess || index < 0 || index >= count) {
    const std::string found = error == cudaSuccess ? std::to_string(count) : cudaGetErrorString(error);
    throw std::invalid_argument("device: expected the number of a CUDA GPU, got " + std::to_string(index) +
                                " (found: " + found + ")");
  }
  return std::make_shared<CudaDevice>(index);
}

}  // namespace usaf

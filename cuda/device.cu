// An NVIDIA GPU as the pager sees it (device_api.h), over the CUDA runtime.
//
// Copy streams do not block the legacy default stream, and events carry no times: they order, and nothing else. The
// current device belongs to the thread, and the pager's calls come from its readers' threads too, so each call that
// needs the device makes it current and puts back what was.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "device_api.h"
#include "errors.h"

namespace usaf {
namespace {

void check(cudaError_t error, const char* what) {
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
    if (changed_) static_cast<void>(cudaSetDevice(before_));
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
    static_cast<void>(cudaStreamDestroy(static_cast<cudaStream_t>(stream)));
  }

  Event create_event() override {
    const Current current(index_);
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
    return event;
  }
  void destroy_event(Event event) noexcept override {
    static_cast<void>(cudaEventDestroy(static_cast<cudaEvent_t>(event)));
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
    const cudaError_t state = cudaEventQuery(static_cast<cudaEvent_t>(event));
    if (state == cudaErrorNotReady) {
      static_cast<void>(cudaGetLastError());  // no error: it must not turn up at the next launch
      return false;
    }
    check(state, "event query");
    return true;
  }
  void synchronize(Event event) override {
    count_host_wait();
    check(cudaEventSynchronize(static_cast<cudaEvent_t>(event)), "event synchronize");
  }
  void copy_async(void* dst, const void* src, int64_t bytes, Stream stream) override {
    const Current current(index_);
    check(cudaMemcpyAsync(dst, src, static_cast<size_t>(bytes), cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
          "copy");
  }

  void register_host(void* pointer, size_t bytes) override {
    const Current current(index_);
    const cudaError_t error = cudaHostRegister(pointer, bytes, cudaHostRegisterPortable);
    if (error != cudaSuccess) static_cast<void>(cudaGetLastError());  // whoever asked may go on without
    check(error, "host memory registration");
  }
  void unregister_host(void* pointer) noexcept override { static_cast<void>(cudaHostUnregister(pointer)); }

 private:
  const int index_;
};

}  // namespace

std::shared_ptr<Device> make_gpu_device(int index) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || index < 0 || index >= count) {
    const std::string found = error == cudaSuccess ? std::to_string(count) : cudaGetErrorString(error);
    throw std::invalid_argument("device: expected the number of a CUDA GPU, got " + std::to_string(index) +
                                " (found: " + found + ")");
  }
  return std::make_shared<CudaDevice>(index);
}

}  // namespace usaf

// Test-only: the CUDA names that cuda/ uses, over the emulator.
#pragma once
#include "emulator.h"
#include "runtime.h"

using cudaError_t = int;
using cudaStream_t = void*;
inline constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return emulator::take_last_error(); }
inline const char* cudaGetErrorString(cudaError_t error) { return emulator::runtime::error_text(error); }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return emulator::runtime::get_device(device); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }

// The runtime's part, for device.cu.
using cudaEvent_t = void*;
enum cudaMemcpyKind { cudaMemcpyDefault };
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostRegisterPortable = 1;
inline constexpr cudaError_t cudaErrorNotReady = emulator::runtime::not_ready;
inline cudaError_t cudaGetDeviceCount(int* count) { return emulator::runtime::count_devices(count); }
inline cudaError_t cudaSetDevice(int device) { return emulator::runtime::set_device(device); }
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return *free = size_t{8} << 30, *total = size_t{12} << 30, cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return emulator::runtime::create_stream(stream);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return emulator::runtime::destroy_stream(stream); }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return emulator::runtime::create_event(event);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return emulator::runtime::destroy_event(event); }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return emulator::runtime::record(event, stream);
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return emulator::runtime::stream_wait(stream, event);
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) { return emulator::runtime::query(event); }
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) { return emulator::runtime::synchronize(event); }
inline cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return emulator::runtime::copy_async(dst, src, bytes, stream);
}
inline cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  return emulator::runtime::register_host(pointer, bytes);
}
inline cudaError_t cudaHostUnregister(void* pointer) { return emulator::runtime::unregister_host(pointer); }

#define USAF_LAUNCH_KERNEL(kernel, grid, block, shared_bytes, stream, ...) \
  emulator::launch((grid), (block), (shared_bytes), (stream), 32, [&] { kernel(__VA_ARGS__); })

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = emulator::Site::current()) {
  return emulator::shuffle(mask, value, emulator::indexed_lane(source, width), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulator::Site site = emulator::Site::current()) {
  return emulator::shuffle(mask, value, emulator::xor_lane(bits, width), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Site site = emulator::Site::current()) {
  return emulator::shuffle(mask, value, emulator::down_lane(delta, width), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulator::Site site = emulator::Site::current()) {
  return emulator::shuffle(mask, value, emulator::up_lane(delta, width), site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return static_cast<unsigned>(emulator::ballot(mask, predicate != 0, site));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, emulator::Site site = emulator::Site::current()) {
  return static_cast<unsigned>(emulator::match(mask, value, site));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::current()) {
  emulator::collect(mask, 0, site);
}

// Test-only: the HIP names that hip/ uses, over the emulator. HIP's collectives name no mask: they mean the whole wave.
#pragma once
#include "../emulator.h"
#include "../runtime.h"

#ifndef EMULATED_WAVE_SIZE
#define EMULATED_WAVE_SIZE 32
#endif

using hipError_t = int;
using hipStream_t = void*;
inline constexpr hipError_t hipSuccess = 0;
inline hipError_t hipGetLastError() { return emulator::take_last_error(); }
inline const char* hipGetErrorString(hipError_t error) { return emulator::runtime::error_text(error); }
enum hipDeviceAttribute_t { hipDeviceAttributeMultiprocessorCount };
inline hipError_t hipGetDevice(int* device) { return emulator::runtime::get_device(device); }
inline hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t, int) { return *value = 1, hipSuccess; }

// The runtime's part, for device.hip.
using hipEvent_t = void*;
enum hipMemcpyKind { hipMemcpyDefault };
inline constexpr unsigned hipStreamNonBlocking = 1, hipEventDisableTiming = 2, hipHostRegisterPortable = 1;
inline constexpr hipError_t hipErrorNotReady = emulator::runtime::not_ready;
inline hipError_t hipGetDeviceCount(int* count) { return emulator::runtime::count_devices(count); }
inline hipError_t hipSetDevice(int device) { return emulator::runtime::set_device(device); }
inline hipError_t hipMemGetInfo(size_t* free, size_t* total) {
  return *free = size_t{8} << 30, *total = size_t{12} << 30, hipSuccess;
}
inline hipError_t hipStreamCreateWithFlags(hipStream_t* stream, unsigned) {
  return emulator::runtime::create_stream(stream);
}
inline hipError_t hipStreamDestroy(hipStream_t stream) { return emulator::runtime::destroy_stream(stream); }
inline hipError_t hipEventCreateWithFlags(hipEvent_t* event, unsigned) {
  return emulator::runtime::create_event(event);
}
inline hipError_t hipEventDestroy(hipEvent_t event) { return emulator::runtime::destroy_event(event); }
inline hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream) {
  return emulator::runtime::record(event, stream);
}
inline hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned) {
  return emulator::runtime::stream_wait(stream, event);
}
inline hipError_t hipEventQuery(hipEvent_t event) { return emulator::runtime::query(event); }
inline hipError_t hipEventSynchronize(hipEvent_t event) { return emulator::runtime::synchronize(event); }
inline hipError_t hipMemcpyAsync(void* dst, const void* src, size_t bytes, hipMemcpyKind, hipStream_t stream) {
  return emulator::runtime::copy_async(dst, src, bytes, stream);
}
inline hipError_t hipHostRegister(void* pointer, size_t bytes, unsigned) {
  return emulator::runtime::register_host(pointer, bytes);
}
inline hipError_t hipHostUnregister(void* pointer) { return emulator::runtime::unregister_host(pointer); }

#define hipLaunchKernelGGL(kernel, grid, block, shared_bytes, stream, ...) \
  emulator::launch((grid), (block), (shared_bytes), (stream), EMULATED_WAVE_SIZE, [&] { kernel(__VA_ARGS__); })
#define HIP_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulator::position().dynamic_shared);

inline constexpr int warpSize = EMULATED_WAVE_SIZE;
inline void __threadfence_block() {}  // one OS thread: memory is in order

template <class T>
T __shfl(T value, int source, int width = EMULATED_WAVE_SIZE, emulator::Site site = emulator::Site::current()) {
  return emulator::shuffle(emulator::full_mask(), value, emulator::indexed_lane(source, width), site);
}
template <class T>
T __shfl_xor(T value, int bits, int width = EMULATED_WAVE_SIZE, emulator::Site site = emulator::Site::current()) {
  return emulator::shuffle(emulator::full_mask(), value, emulator::xor_lane(bits, width), site);
}
template <class T>
T __shfl_down(T value, unsigned delta, int width = EMULATED_WAVE_SIZE,
              emulator::Site site = emulator::Site::current()) {
  return emulator::shuffle(emulator::full_mask(), value, emulator::down_lane(delta, width), site);
}
template <class T>
T __shfl_up(T value, unsigned delta, int width = EMULATED_WAVE_SIZE, emulator::Site site = emulator::Site::current()) {
  return emulator::shuffle(emulator::full_mask(), value, emulator::up_lane(delta, width), site);
}
inline unsigned long long __ballot(int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::ballot(emulator::full_mask(), predicate != 0, site);
}

// Test-only: the HIP names that hip/ uses, over the emulator. HIP's collectives name no mask: they mean the whole wave.
#pragma once
#include "../emulator.h"

#ifndef EMULATED_WAVE_SIZE
#define EMULATED_WAVE_SIZE 32
#endif

using hipError_t = int;
using hipStream_t = void*;
inline constexpr hipError_t hipSuccess = 0;
inline hipError_t hipGetLastError() { return emulator::take_last_error(); }
inline const char* hipGetErrorString(hipError_t error) { return error == 0 ? "no error" : "emulated error"; }
enum hipDeviceAttribute_t { hipDeviceAttributeMultiprocessorCount };
inline hipError_t hipGetDevice(int* device) { return *device = 0, hipSuccess; }
inline hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t, int) { return *value = 1, hipSuccess; }

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

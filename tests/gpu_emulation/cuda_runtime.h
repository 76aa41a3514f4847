// Test-only: the CUDA names that cuda/ uses, over the emulator.
#pragma once
#include "emulator.h"

using cudaError_t = int;
using cudaStream_t = void*;
inline constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return emulator::take_last_error(); }
inline const char* cudaGetErrorString(cudaError_t error) { return error == 0 ? "no error" : "emulated error"; }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }

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

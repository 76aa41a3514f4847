// Test-only: small kernels with the mistakes that the emulator is there to catch, and the same ones without.
#include <algorithm>
#include <exception>
#include <string>

#ifdef EMULATE_HIP
#include <hip/hip_runtime.h>
#define LAUNCH(kernel, grid, block, shared_bytes, ...) \
  hipLaunchKernelGGL(kernel, grid, block, shared_bytes, nullptr, __VA_ARGS__)
#define SHUFFLE_XOR(value, bits) __shfl_xor(value, bits)
#else
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, shared_bytes, ...) \
  USAF_LAUNCH_KERNEL(kernel, grid, block, shared_bytes, nullptr, __VA_ARGS__)
#define SHUFFLE_XOR(value, bits) __shfl_xor_sync(0xffffffffu, value, bits)
#endif

namespace {

constexpr int kThreads = 96;

enum Mistake {
  kNone,
  kNoBarrier,
  kPartialBarrier,
  kTwoBarriers,
  kEarlyExit,
  kDivergentShuffle,
  kReadPastEnd,
  kWrongMask,
  kMaskWithoutCaller
};

// out[i] = in[n - 1 - i] within a block, through shared memory.
__global__ void reverse(const int* in, int* out, Mistake mistake) {
  __shared__ int tile[kThreads];
  const int i = static_cast<int>(threadIdx.x), base = static_cast<int>(blockIdx.x) * kThreads;
  if (mistake == kEarlyExit && i == 5) return;
  tile[i] = in[base + i + (mistake == kReadPastEnd ? kThreads : 0)];
  if (mistake == kPartialBarrier) {
    if (i < 16) __syncthreads();
  } else if (mistake == kTwoBarriers && i % 2 == 0) {
    __syncthreads();
  } else if (mistake != kNoBarrier) {
    __syncthreads();
  }
  out[base + i] = tile[kThreads - 1 - i];
}

// out[0] = sum of in over the one block: shuffles in a warp, then shared memory between warps.
__global__ void sum(const int* in, int* out, Mistake mistake) {
  __shared__ int part[kThreads / 32];
  const int i = static_cast<int>(threadIdx.x);
  int value = in[i];
  for (int bits = 16; bits > 0; bits /= 2) {
    if (mistake == kDivergentShuffle && i == 7) break;
#ifndef EMULATE_HIP
    if (mistake == kWrongMask) {
      if (i % 32 < 16) value += __shfl_xor_sync(0x0000ffffu, value, bits);
      continue;
    }
    if (mistake == kMaskWithoutCaller) {
      value += __shfl_xor_sync(0xfffffffeu, value, bits);
      continue;
    }
#endif
    value += SHUFFLE_XOR(value, bits);
  }
  if (i % 32 == 0) part[i / 32] = value;
  __syncthreads();
  if (i == 0) *out = part[0] + part[1] + part[2];
}

// The same sum in a tree over dynamic shared memory, and the number of odd inputs by ballots.
__global__ void tree_sum(const int* in, int* out, int count) {
#ifdef EMULATE_HIP
  HIP_DYNAMIC_SHARED(int, tile)
#else
  int* tile = static_cast<int*>(emulator::position().dynamic_shared);
#endif
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = i < count ? in[i] : 0;
  __syncthreads();
  for (int step = 64; step > 0; step /= 2) {
    if (i < step) tile[i] += tile[i + step];
    __syncthreads();
  }
#ifdef EMULATE_HIP
  const unsigned long long odd = __ballot(i < count && in[i] % 2 != 0);
#else
  const unsigned odd = __ballot_sync(0xffffffffu, i < count && in[i] % 2 != 0);
#endif
  if (i == 0) out[0] = tile[0];
  if (i == 0) out[1] = __builtin_popcountll(odd);
}

std::string message;

template <class Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

}  // namespace

extern "C" {
const char* last_message() { return message.c_str(); }
void set_schedule(int schedule) { emulator::control().schedule = schedule; }
void* device_malloc(size_t bytes) { return ::operator new(bytes, std::align_val_t{16}); }
void device_free(void* memory) { ::operator delete(memory, std::align_val_t{16}); }
int run_reverse(const int* in, int* out, int blocks, int mistake) {
  return guarded([&] { LAUNCH(reverse, dim3(blocks), dim3(kThreads), 0, in, out, static_cast<Mistake>(mistake)); });
}
int run_sum(const int* in, int* out, int mistake) {
  return guarded([&] { LAUNCH(sum, dim3(1), dim3(kThreads), 0, in, out, static_cast<Mistake>(mistake)); });
}
int run_tree_sum(const int* in, int* out, int count) {
  return guarded([&] { LAUNCH(tree_sum, dim3(1), dim3(128), 128 * sizeof(int), in, out, count); });
}
}

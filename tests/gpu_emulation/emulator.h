// Test-only: what a GPU promises to a kernel, on the CPU. cuda_runtime.h and hip/hip_runtime.h beside this file put the
// vendors' names on it, so that the real sources of cuda/ and hip/ compile as host C++ and run.
//
// One block runs at a time, on one OS thread, one fiber per GPU thread. A fiber runs until it ends or meets its
// fellows: at a barrier or at a warp collective. Nothing else switches, so the order in which fibers run is ours to
// choose: `schedule` says ascending, descending, shuffled or by whole warps, and a kernel must give the same result in
// each. Shared
// memory is filled with 0xff before every block. Stricter than hardware where hardware is only undefined:
//  - a barrier must be reached by every thread of the block, at the same source line;
//  - a warp collective must be reached by every lane its mask names, at the same line with the same mask;
//  - a lane may not read a lane outside the mask, or call a collective whose mask leaves it out.
// Any breach throws std::runtime_error out of the launch. Not shown: races that need two threads at once, and speed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

namespace emulator {

using Site = std::source_location;

inline constexpr int kWholeWarps = -1;  // a schedule: a warp runs to the next barrier before another one starts

// What the device does next, and what it did last: set and read by the tests.
struct Control {
  int schedule = 0;     // 0 ascending, 1 descending, kWholeWarps, else the seed of a shuffle
  int fail_launch = 0;  // the error that the next launch reports instead of running
  void* last_stream = nullptr;
  int64_t launches = 0;
};
Control& control();

// Where the running thread is.
struct Position {
  dim3 grid, block, block_index, thread;
  int linear;  // thread number in the block
  void* dynamic_shared;
};
const Position& position();

// Runs the whole grid; `body` is one thread of the kernel. The next take_last_error() says whether it could, or what
// another call of this thread left there before.
void launch(dim3 grid, dim3 block, size_t shared_bytes, void* stream, int warp_size, const std::function<void()>& body);
int take_last_error();
void set_last_error(int error);  // of the calling thread

void barrier(Site site);
// Waits for the lanes of `mask`, then returns their contributions; entries outside the mask are not defined.
const uint64_t* collect(uint64_t mask, uint64_t value, Site site);
[[noreturn]] void fail(const std::string& message);  // from inside a kernel
int warp_size();
int lane();
uint64_t full_mask();  // the lanes that this warp has

template <class T>
T shuffle(uint64_t mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  const uint64_t* values = collect(mask, bits, site);
  if ((mask >> source & 1) == 0) fail("shuffle reads lane " + std::to_string(source) + ", which its mask leaves out");
  memcpy(&value, &values[source], sizeof value);
  return value;
}

// Where the shuffles read, in groups of `width` lanes; past a group's end it is the lane itself.
inline int indexed_lane(int source, int width) { return lane() / width * width + source % width; }
inline int xor_lane(int bits, int width) {
  const int source = lane() ^ bits;
  return source / width <= lane() / width ? source : lane();
}
inline int down_lane(unsigned delta, int width) {
  return lane() % width + static_cast<int>(delta) < width ? lane() + static_cast<int>(delta) : lane();
}
inline int up_lane(unsigned delta, int width) {
  return lane() % width >= static_cast<int>(delta) ? lane() - static_cast<int>(delta) : lane();
}

inline uint64_t ballot(uint64_t mask, bool predicate, Site site) {
  const uint64_t* values = collect(mask, predicate, site);
  uint64_t result = 0;
  for (int i = 0; i < warp_size(); ++i) result |= uint64_t{(mask >> i & 1) != 0 && values[i] != 0} << i;
  return result;
}

// The lanes of the mask whose value equals the caller's.
template <class T>
uint64_t match(uint64_t mask, T value, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0, result = 0;
  memcpy(&bits, &value, sizeof value);
  const uint64_t* values = collect(mask, bits, site);
  for (int i = 0; i < warp_size(); ++i) result |= uint64_t{(mask >> i & 1) != 0 && values[i] == bits} << i;
  return result;
}

}  // namespace emulator

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block at a time, all on one OS thread: thread-local variables are shared memory, and lie together in one segment
// that the emulator fills between blocks. (A section of their own would do, but g++ 12 ignores it in templates.)
#define __shared__ static thread_local
#define threadIdx (emulator::position().thread)
#define blockIdx (emulator::position().block_index)
#define blockDim (emulator::position().block)
#define gridDim (emulator::position().grid)

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline void __syncthreads(emulator::Site site = emulator::Site::current()) { emulator::barrier(site); }

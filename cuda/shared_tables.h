// Tables on the device, and how a thread block copies one to its shared memory.
#pragma once
#include <cstdint>

#include "launch.h"
#include "numerics/adam_quad.h"

namespace usaf::gpu {

__device__ constexpr Nf4Tables kNf4 = kNf4Tables;

// By the block's first `threads` threads; a barrier must follow.
template <class Table>
__device__ __forceinline__ void copy_table(Table& shared, const Table& table, int thread, int threads) {
  static_assert(sizeof(Table) % sizeof(uint32_t) == 0);
  constexpr int kWords = sizeof(Table) / sizeof(uint32_t);
#pragma unroll 4
  for (int i = thread; i < kWords; i += threads) {
    reinterpret_cast<uint32_t*>(&shared)[i] = reinterpret_cast<const uint32_t*>(&table)[i];
  }
}

}  // namespace usaf::gpu

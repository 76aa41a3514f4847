// Rows of fp32, bf16 or fp16 in accesses of 16 bytes: what the HIP sources share.
//
// A workgroup lies along a row; which row is uniform over it, so row lists and addresses are scalar work. A "pack" is
// what a lane holds: 16 bytes, 4 fp32 or 8 of 16 bits.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "kernel_api.h"
#include "launch.h"
#include "numerics/bfloat16.h"
#include "numerics/block_codec.h"
#include "numerics/float16.h"

namespace usaf::gpu {

inline constexpr int kMaxThreads = 256;
inline constexpr int kMinThreads = 64;                                      // a whole wave on every chip
inline constexpr int64_t kMaxGridX = (int64_t{1} << 32) / kMaxThreads - 1;  // a grid has under 2^32 threads

template <class T>
struct Layout {
  static constexpr int kPack = 16 / sizeof(T);       // weights a lane holds
  static constexpr int kLanes = kBlockSize / kPack;  // lanes that share a block of weights
};

struct alignas(16) Pack {
  uint32_t word[4];
};

// One 16-byte access. As a single integer: a struct of words would be taken apart and merged with the tail's accesses.
using Wide = unsigned __int128;

__device__ __forceinline__ Pack load_wide(const void* source) {
  const Wide raw = *static_cast<const Wide*>(source);
  return {{static_cast<uint32_t>(raw), static_cast<uint32_t>(raw >> 32), static_cast<uint32_t>(raw >> 64),
           static_cast<uint32_t>(raw >> 96)}};
}

__device__ __forceinline__ void store_wide(void* target, const Pack& pack) {
  *static_cast<Wide*>(target) =
      Wide{pack.word[3]} << 96 | Wide{pack.word[2]} << 64 | Wide{pack.word[1]} << 32 | Wide{pack.word[0]};
}

// Weight `i` of a pack, as fp32.
template <class T>
__device__ __forceinline__ float weight_of(const Pack& pack, int i) {
  if constexpr (sizeof(T) == 4) {
    return bits_float(pack.word[i]);
  } else if constexpr (std::is_same_v<T, Bf16>) {
    return bits_float(i % 2 == 0 ? pack.word[i / 2] << 16 : pack.word[i / 2] & 0xffff0000u);
  } else {
    return to_float(T{static_cast<uint16_t>(pack.word[i / 2] >> (i % 2 * 16))});
  }
}

// Word `i` of the pack that holds `weight`.
template <class T>
__device__ __forceinline__ uint32_t packed_word(const float (&weight)[Layout<T>::kPack], int i) {
  if constexpr (sizeof(T) == 4) {
    return float_bits(weight[i]);
  } else {
    return static_cast<uint32_t>(from_float<T>(weight[2 * i + 1]).bits) << 16 | from_float<T>(weight[2 * i]).bits;
  }
}

// The pack at `col`, zeros past the row's end. A pack that does not end in the row, or starts at an odd address, is put
// together weight by weight. USAF_OPAQUE: clang 18 and newer would keep row + i of every i and every row in scalar
// registers, until those spill.
template <class T>
__device__ __forceinline__ Pack load_weights(const T* __restrict__ row, int64_t col, int64_t cols, bool aligned) {
  constexpr int kPack = Layout<T>::kPack;
  if (aligned && col + kPack <= cols) return load_wide(row + col);
  Pack pack = {};
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    int64_t at = col + i;
    USAF_OPAQUE(at);
    if (at >= cols) continue;
    if constexpr (sizeof(T) == 4) {
      pack.word[i] = float_bits(row[at]);
    } else {
      pack.word[i / 2] |= static_cast<uint32_t>(row[at].bits) << (i % 2 * 16);
    }
  }
  return pack;
}

template <class T>
__device__ __forceinline__ void store_weights(T* __restrict__ row, int64_t col, int64_t cols, bool aligned,
                                              const Pack& pack) {
  constexpr int kPack = Layout<T>::kPack;
  if (aligned && col + kPack <= cols) {
    store_wide(row + col, pack);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    int64_t at = col + i;
    USAF_OPAQUE(at);
    if (at >= cols) continue;
    if constexpr (sizeof(T) == 4) {
      row[at] = bits_float(pack.word[i]);
    } else {
      row[at] = T{static_cast<uint16_t>(pack.word[i / 2] >> (i % 2 * 16))};
    }
  }
}

struct LaunchShape {
  dim3 grid, block;
};

// Threads of a workgroup that lies along a row of `packs`.
inline int threads_along(int64_t packs) {
  int threads = kMinThreads;
  while (threads < kMaxThreads && threads < packs) threads *= 2;
  return threads;
}

inline LaunchShape launch_shape(int rows, int64_t num_rows, int64_t packs) {
  const int threads = threads_along(packs);
  const int64_t grid_x = (packs + threads - 1) / threads, grid_y = (num_rows + rows - 1) / rows;
  if (grid_x > kMaxGridX) throw std::invalid_argument("a row is too long for the GPU kernels");
  return {dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(std::min(grid_y, kMaxGridY))),
          dim3(static_cast<unsigned>(threads))};
}

inline bool aligned(const void* pointer, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

// body(T{}) with T = float, Bf16 or F16.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(Bf16{});
    case DType::f16:
      return body(F16{});
  }
}

}  // namespace usaf::gpu

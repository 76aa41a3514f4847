// Rows of fp32, bf16 or fp16 in accesses of 16 bytes: what the CUDA sources share.
//
// A "pack" is 16 bytes of a row: 4 fp32 or 8 of 16 bits. A pack that does not end in the row, or a row that does not
// start at a multiple of 16 bytes, is moved element by element.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "kernel_api.h"
#include "launch.h"
#include "numerics/bfloat16.h"
#include "numerics/float16.h"

namespace usaf::gpu {

inline constexpr int kThreads = 256;
inline constexpr int kBlocksPerSm = 3;  // up to 85 registers: left alone, ptxas stops at 64 for sm_120 and spills
inline constexpr unsigned kFullWarp = 0xffffffffu;
inline constexpr int64_t kMaxGridX = 2147483647;

template <class T>
constexpr int kPack = 16 / sizeof(T);  // elements in one 16-byte access

__device__ __forceinline__ void unpack(uint4 pack, float (&weight)[4], float) {
  weight[0] = bits_float(pack.x), weight[1] = bits_float(pack.y);
  weight[2] = bits_float(pack.z), weight[3] = bits_float(pack.w);
}

template <class T>
__device__ __forceinline__ void unpack(uint4 pack, float (&weight)[8], T) {
  const uint32_t words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weight[2 * i] = to_float(T{static_cast<uint16_t>(words[i])});
    weight[2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
  }
}

__device__ __forceinline__ uint4 repack(const float (&weight)[4], float) {
  return make_uint4(float_bits(weight[0]), float_bits(weight[1]), float_bits(weight[2]), float_bits(weight[3]));
}

__device__ __forceinline__ uint4 repack(const float (&weight)[8], Bf16) {
  uint32_t words[4];
  to_bf16_pairs(weight, words);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint32_t f16_pair(float low, float high) {
  return to_f16(low).bits | static_cast<uint32_t>(to_f16(high).bits) << 16;  // one instruction from sm_80 on
}

__device__ __forceinline__ uint4 repack(const float (&weight)[8], F16) {
  return make_uint4(f16_pair(weight[0], weight[1]), f16_pair(weight[2], weight[3]), f16_pair(weight[4], weight[5]),
                    f16_pair(weight[6], weight[7]));
}

// Whether the pack at `col` is one access. `aligned`: rows start at multiples of 16 bytes.
template <class T>
__device__ __forceinline__ bool is_whole(int64_t col, int64_t cols, bool aligned) {
  return aligned && col + kPack<T> <= cols;
}

// The pack at `col`; zeros past the row's end.
__device__ __forceinline__ uint4 load_pack(const float* row, int64_t col, int64_t cols, bool whole) {
  if (whole) return __ldg(reinterpret_cast<const uint4*>(row + col));
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = col + i < cols ? float_bits(__ldg(row + col + i)) : 0u;
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T>
__device__ __forceinline__ uint4 load_pack(const T* row, int64_t col, int64_t cols, bool whole) {
  if (whole) return __ldg(reinterpret_cast<const uint4*>(row + col));
  const auto* bits = reinterpret_cast<const unsigned short*>(row);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = col + 2 * i < cols ? __ldg(bits + col + 2 * i) : 0u;
    const uint32_t high = col + 2 * i + 1 < cols ? __ldg(bits + col + 2 * i + 1) : 0u;
    words[i] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// load_pack of memory that the kernel itself writes.
template <class T>
__device__ __forceinline__ uint4 load_plain_pack(const T* row, int64_t col, int64_t cols, bool whole) {
  if (whole) return *reinterpret_cast<const uint4*>(row + col);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    if (col + i >= cols) continue;
    if constexpr (sizeof(T) == 4) {
      words[i] = float_bits(row[col + i]);
    } else {
      words[i / 2] |= static_cast<uint32_t>(row[col + i].bits) << (i % 2 * 16);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ void store_pack(float* row, int64_t col, int64_t cols, bool whole, uint4 pack) {
  if (whole) {
    *reinterpret_cast<uint4*>(row + col) = pack;
    return;
  }
  const uint32_t words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (col + i < cols) row[col + i] = bits_float(words[i]);
  }
}

template <class T>
__device__ __forceinline__ void store_pack(T* row, int64_t col, int64_t cols, bool whole, uint4 pack) {
  if (whole) {
    *reinterpret_cast<uint4*>(row + col) = pack;
    return;
  }
  const uint32_t words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (col + i < cols) row[col + i] = T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))};
  }
}

struct LaunchShape {
  dim3 grid, block;
};

// Blocks as wide as the row, up to all threads; what is left of the threads goes to more rows, of which each thread
// takes `rows_in_flight` at a time.
inline LaunchShape launch_shape(int rows_in_flight, int64_t num_rows, int64_t packs) {
  int width = 16;  // whole blocks of weights for the codec's shuffles
  while (width < kThreads && width < packs) width *= 2;
  const int height = kThreads / width;
  const int64_t grid_x = (packs + width - 1) / width;
  const int64_t grid_y = (num_rows + height * rows_in_flight - 1) / (height * rows_in_flight);
  if (grid_x > kMaxGridX) throw std::invalid_argument("a row is too long for the GPU kernels");
  return {dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(std::min(grid_y, kMaxGridY))),
          dim3(static_cast<unsigned>(width), static_cast<unsigned>(height))};
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

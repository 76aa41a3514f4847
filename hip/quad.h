// Four neighbouring elements of a row, one lane's part (numerics/adam_quad.h), from and to memory.
#pragma once
#include <cstdint>

#include "pack.h"
#include "shared_tables.h"

namespace usaf::gpu {

__device__ __forceinline__ int quad_count(int64_t col, int64_t cols) {
  return static_cast<int>(col >= cols ? 0 : cols - col < kQuad ? cols - col : kQuad);
}

// Pack the `count` > 0 elements of kBytes each in as few words as hold them, zeros past them. kWide, as in
// load_weights: there are four, where an access of four may be.
template <bool kWide, int kBytes>
__device__ __forceinline__ Pack load_four(const uint8_t* __restrict__ source, int count) {
  if constexpr (kWide && kBytes == 4) return load_wide(source);
  if constexpr (kWide && kBytes == 2) {
    const uint2 half = *reinterpret_cast<const uint2*>(source);
    return {{half.x, half.y}};
  }
  if constexpr (kWide && kBytes == 1) return {{*reinterpret_cast<const uint32_t*>(source)}};
  Pack four = {};
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (i >= count) continue;
    if constexpr (kBytes == 4) four.word[i] = reinterpret_cast<const uint32_t*>(source)[i];
    if constexpr (kBytes == 2) {
      four.word[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(source)[i]) << i % 2 * 16;
    }
    if constexpr (kBytes == 1) four.word[0] |= static_cast<uint32_t>(source[i]) << 8 * i;
  }
  return four;
}

template <bool kWide, int kBytes>
__device__ __forceinline__ void store_four(uint8_t* __restrict__ target, const Pack& four, int count) {
  if constexpr (kWide && kBytes == 4) return store_wide(target, four);
  if constexpr (kWide && kBytes == 2) {
    *reinterpret_cast<uint2*>(target) = make_uint2(four.word[0], four.word[1]);
  } else if constexpr (kWide) {
    *reinterpret_cast<uint32_t*>(target) = four.word[0];
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i >= count) continue;
      if constexpr (kBytes == 4) reinterpret_cast<uint32_t*>(target)[i] = four.word[i];
      if constexpr (kBytes == 2) {
        reinterpret_cast<uint16_t*>(target)[i] = static_cast<uint16_t>(four.word[i / 2] >> i % 2 * 16);
      }
      if constexpr (kBytes == 1) target[i] = static_cast<uint8_t>(four.word[0] >> 8 * i);
    }
  }
}

// The codes of a quad. A row's codes end in padding, so a quad's are there even where the row ends inside it.
template <Format kFormat>
__device__ __forceinline__ QuadCodes<kFormat> load_codes(const uint8_t* __restrict__ source) {
  if constexpr (is_nf4(kFormat)) return *reinterpret_cast<const uint16_t*>(source);
  if constexpr (kFormat == Format::bf16) return *reinterpret_cast<const uint64_t*>(source);
  return *reinterpret_cast<const uint32_t*>(source);
}

template <Format kFormat>
__device__ __forceinline__ void store_codes(uint8_t* __restrict__ target, QuadCodes<kFormat> codes) {
  if constexpr (is_nf4(kFormat)) {
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(codes);
  } else if constexpr (kFormat == Format::bf16) {
    *reinterpret_cast<uint64_t*>(target) = codes;
  } else {
    *reinterpret_cast<uint32_t*>(target) = static_cast<uint32_t>(codes);
  }
}

}  // namespace usaf::gpu

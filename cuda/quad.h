// Four neighbouring elements of a row, one lane's part (numerics/adam_quad.h), from and to memory.
#pragma once
#include <cstdint>

#include "launch.h"
#include "numerics/adam_quad.h"
#include "shared_tables.h"

namespace usaf::gpu {

__device__ __forceinline__ int quad_count(int64_t col, int64_t cols) {
  return static_cast<int>(col >= cols ? 0 : cols - col < kQuad ? cols - col : kQuad);
}

// Four elements of kBytes each, zeros past `count`. `wide`: every row starts where its four-element accesses may.
template <int kBytes>
__device__ __forceinline__ uint4 load_four(const void* source, int count, bool wide) {
  uint32_t word[4] = {};
  if (wide && count == kQuad) {
    if constexpr (kBytes == 4) return *static_cast<const uint4*>(source);
    if constexpr (kBytes == 2) {
      const uint2 half = *static_cast<const uint2*>(source);
      return make_uint4(half.x, half.y, 0, 0);
    }
    word[0] = *static_cast<const uint32_t*>(source);
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i >= count) continue;
      if constexpr (kBytes == 4) word[i] = static_cast<const uint32_t*>(source)[i];
      if constexpr (kBytes == 2) word[i / 2] |= uint32_t{static_cast<const uint16_t*>(source)[i]} << i % 2 * 16;
      if constexpr (kBytes == 1) word[0] |= uint32_t{static_cast<const uint8_t*>(source)[i]} << 8 * i;
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

template <int kBytes>
__device__ __forceinline__ void store_four(void* target, uint4 words, int count, bool wide) {
  if (wide && count == kQuad) {
    if constexpr (kBytes == 4) *static_cast<uint4*>(target) = words;
    if constexpr (kBytes == 2) *static_cast<uint2*>(target) = make_uint2(words.x, words.y);
    if constexpr (kBytes == 1) *static_cast<uint32_t*>(target) = words.x;
    return;
  }
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (i >= count) continue;
    if constexpr (kBytes == 4) static_cast<uint32_t*>(target)[i] = word[i];
    if constexpr (kBytes == 2) static_cast<uint16_t*>(target)[i] = static_cast<uint16_t>(word[i / 2] >> i % 2 * 16);
    if constexpr (kBytes == 1) static_cast<uint8_t*>(target)[i] = static_cast<uint8_t>(word[0] >> 8 * i);
  }
}

__device__ __forceinline__ const void* at(const void* data, int64_t element, int bytes) {
  return static_cast<const uint8_t*>(data) + element * bytes;
}
__device__ __forceinline__ void* at(void* data, int64_t element, int bytes) {
  return static_cast<uint8_t*>(data) + element * bytes;
}

// The codes of a quad. A row's codes end in padding, so a quad's are there even where the row ends inside it.
template <Format kFormat>
__device__ __forceinline__ QuadCodes<kFormat> load_codes(const uint8_t* source) {
  if constexpr (kFormat == Format::bf16) {
    const uint2 words = *reinterpret_cast<const uint2*>(source);
    return words.x | uint64_t{words.y} << 32;
  } else if constexpr (is_nf4(kFormat)) {
    return *reinterpret_cast<const uint16_t*>(source);
  } else {
    return *reinterpret_cast<const uint32_t*>(source);
  }
}

template <Format kFormat>
__device__ __forceinline__ void store_codes(uint8_t* target, QuadCodes<kFormat> codes) {
  if constexpr (kFormat == Format::bf16) {
    *reinterpret_cast<uint2*>(target) = make_uint2(static_cast<uint32_t>(codes), static_cast<uint32_t>(codes >> 32));
  } else if constexpr (is_nf4(kFormat)) {
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(codes);
  } else {
    *reinterpret_cast<uint32_t*>(target) = codes;
  }
}

}  // namespace usaf::gpu

// The codec's rows and blocks as plain loops, to be inlined into a function of each instruction set (isa.h), where the
// compiler vectorises them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../numerics/bfloat16.h"
#include "../numerics/block_codec.h"
#include "simd.h"

namespace usaf::cpu {

template <class From, class To>
USAF_ALWAYS_INLINE void convert(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof *to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from_float<To>(to_float(from[i]));
  }
}

// The codes of `count` <= 64 weights, packed; returns the block's scale. `random` null: to nearest.
template <Format kFormat, class T>
USAF_ALWAYS_INLINE typename BlockCodec<kFormat>::Scale encode_block_generic(const T* weight, int64_t count,
                                                                            const uint32_t* random, uint8_t* codes) {
  using Codec = BlockCodec<kFormat>;
  float value[kBlockSize] = {};
  convert(weight, count, value);
  uint32_t largest = 0;
  for (int64_t i = 0; i < kBlockSize; ++i) largest = std::max(largest, magnitude_bits(value[i]));
  const typename Codec::Scale scale = Codec::make_scale(bits_float(largest));
  const float inverse = inverse_step(Codec::step(scale));
  uint32_t code[kBlockSize];
  if (random) {
    for (int64_t i = 0; i < count; ++i) code[i] = Codec::encode_stochastic(value[i] * inverse, random[i]);
  } else {
    for (int64_t i = 0; i < kBlockSize; ++i) code[i] = Codec::encode(value[i] * inverse);
  }
  if constexpr (is_nf4(kFormat)) {
    if (count % 2 != 0) code[count] = 0;  // the other half of the last byte
    for (int64_t i = 0; i < (count + 1) / 2; ++i) {
      codes[i] = static_cast<uint8_t>((code[2 * i] << 4) | code[2 * i + 1]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(code[i]);
  }
  return scale;
}

template <Format kFormat, class T>
USAF_ALWAYS_INLINE void decode_block_generic(const uint8_t* codes, typename BlockCodec<kFormat>::Scale scale,
                                             int64_t count, T* out) {
  const float step = BlockCodec<kFormat>::step(scale);
  if constexpr (is_nf4(kFormat)) {
    T table[16];  // scaled and rounded once instead of once a weight
    for (int c = 0; c < 16; ++c) table[c] = from_float<T>(kNf4Values[c] * step);
    for (int64_t i = 0; i < count / 2; ++i) {
      out[2 * i] = table[codes[i] >> 4];
      out[2 * i + 1] = table[codes[i] & 15];
    }
    if (count % 2 != 0) out[count - 1] = table[codes[count / 2] >> 4];
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(BlockCodec<kFormat>::value(codes[i]) * step);
  }
}

template <Format kFormat, class T>
USAF_ALWAYS_INLINE void encode_row_generic(const T* weight, int64_t cols, uint8_t* codes, void* absmax) {
  if constexpr (kFormat == Format::bf16) {
    convert(weight, cols, reinterpret_cast<Bf16*>(codes));
  } else {
    auto* scales = static_cast<typename BlockCodec<kFormat>::Scale*>(absmax);
    for (int64_t start = 0; start < cols; start += kBlockSize) {
      scales[start / kBlockSize] = encode_block_generic<kFormat>(weight + start, std::min(kBlockSize, cols - start),
                                                                 nullptr, codes + used_bytes(kFormat, start));
    }
  }
}

template <Format kFormat, class T>
USAF_ALWAYS_INLINE void decode_row_generic(const uint8_t* codes, const void* absmax, int64_t cols, T* out) {
  if constexpr (kFormat == Format::bf16) {
    convert(reinterpret_cast<const Bf16*>(codes), cols, out);
  } else {
    const auto* scales = static_cast<const typename BlockCodec<kFormat>::Scale*>(absmax);
    for (int64_t start = 0; start < cols; start += kBlockSize) {
      decode_block_generic<kFormat>(codes + used_bytes(kFormat, start), scales[start / kBlockSize],
                                    std::min(kBlockSize, cols - start), out + start);
    }
  }
}

// One block of float weights.
template <Format kFormat>
USAF_ALWAYS_INLINE void encode_stochastic_generic(const float* weight, int64_t count, const uint32_t* random,
                                                  uint8_t* codes, void* absmax) {
  if constexpr (kFormat == Format::bf16) {
    auto* out = reinterpret_cast<Bf16*>(codes);
    for (int64_t i = 0; i < count; ++i) out[i] = to_bf16_stochastic(weight[i], random[i]);
  } else {
    *static_cast<typename BlockCodec<kFormat>::Scale*>(absmax) =
        encode_block_generic<kFormat>(weight, count, random, codes);
  }
}

}  // namespace usaf::cpu

// NF4: 4-bit NormalFloat with one fp32 absmax per block of 64 weights.
//
// Formula: absmax = max |w|; code = index of the table entry nearest to w * (1 / max(absmax, 1e-38)), ties to the lower
// index; decode = table[code] * absmax in fp32. The table is the published one (Dettmers et al., QLoRA, arXiv
// 2305.14314, appendix E). Full blocks equal bitsandbytes' quantize_4bit byte for byte; a short block follows the same
// formula. The first weight of a pair stands in the high nibble. A block of zeros has absmax 0 and code 7.
#pragma once
#include <cstdint>

#include "host_device.h"

// One list for every backend: host and device tables are initialised from it.
#define USAF_NF4_VALUES                                                                               \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,    \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f

namespace usaf {

inline constexpr float kNf4Values[16] = {USAF_NF4_VALUES};
inline constexpr int kNf4ZeroCode = 7;
static_assert(kNf4Values[kNf4ZeroCode] == 0.0f && kNf4Values[15] == 1.0f && sizeof(kNf4Values) == 16 * sizeof(float));

inline constexpr float kNf4MinAbsmax = 1e-38f;

// The bound between codes `i` and `i + 1`. A constant when `i` is one.
USAF_HD constexpr float nf4_threshold(int i) {
  constexpr float values[16] = {USAF_NF4_VALUES};
  return (values[i] + values[i + 1]) * 0.5f;
}

// The value of a code, from constants alone: device code fills its own tables with it (kNf4Values lives on the host).
USAF_HD constexpr float nf4_value(uint32_t code) {
  constexpr float values[16] = {USAF_NF4_VALUES};
  float value = values[0];
  for (uint32_t i = 1; i < 16; ++i) value = code == i ? values[i] : value;
  return value;
}

// Where the code of weight `i` of a pack stands in the little-endian word that holds the pack's codes, in bits.
USAF_HD constexpr int nf4_shift(int i) { return 4 * (i ^ 1); }
static_assert(nf4_value(kNf4ZeroCode) == 0.0f && nf4_shift(0) == 4 && nf4_shift(1) == 0 && nf4_shift(2) == 12);

USAF_HD float nf4_inverse_scale(float absmax) { return 1.0f / (absmax > kNf4MinAbsmax ? absmax : kNf4MinAbsmax); }

// `normalized` = w * nf4_inverse_scale(absmax). Four compares, no table, no branch.
USAF_HD uint32_t nf4_encode(float normalized) {
  const bool b3 = normalized > nf4_threshold(7);
  const float t2 = b3 ? nf4_threshold(11) : nf4_threshold(3);
  const bool b2 = normalized > t2;
  const float t1 = b3 ? (b2 ? nf4_threshold(13) : nf4_threshold(9)) : (b2 ? nf4_threshold(5) : nf4_threshold(1));
  const bool b1 = normalized > t1;
  const float t0_high = b2 ? (b1 ? nf4_threshold(14) : nf4_threshold(12)) : (b1 ? nf4_threshold(10) : nf4_threshold(8));
  const float t0_low = b2 ? (b1 ? nf4_threshold(6) : nf4_threshold(4)) : (b1 ? nf4_threshold(2) : nf4_threshold(0));
  const bool b0 = normalized > (b3 ? t0_high : t0_low);
  return (uint32_t{b3} << 3) | (uint32_t{b2} << 2) | (uint32_t{b1} << 1) | uint32_t{b0};
}

}  // namespace usaf

// int8: symmetric codes -127 .. 127 with one fp32 absmax per block of 64 weights.
//
// Formula: step = absmax / 127; code = round(w * inverse_step(step)), ties to even, clamped to +-127, as two's
// complement; decode = code * step in fp32. A block of zeros has absmax 0 and codes 0.
#pragma once
#include <cstdint>

#include "float_bits.h"
#include "host_device.h"

namespace usaf {

inline constexpr float kInt8Max = 127.0f;

USAF_HD float int8_step(float absmax) { return absmax / kInt8Max; }

// NaN becomes -127: every input has a code.
USAF_HD float int8_clamp(float normalized) {
  const float above = normalized > -kInt8Max ? normalized : -kInt8Max;
  return above < kInt8Max ? above : kInt8Max;
}

// An integer of -127 .. 127 as a byte; adding 1.5 * 2^23 leaves it in the low bits.
USAF_HD uint32_t int8_byte(float integer) { return float_bits(integer + 12582912.0f) & 0xffu; }

USAF_HD uint32_t int8_encode(float normalized) { return int8_byte(int8_clamp(normalized)); }

// Stochastic rounding to one of the two neighbouring integers, the upper one with a probability equal to the fraction.
// `uniform` is in [0, 1).
USAF_HD uint32_t int8_encode_stochastic(float normalized, float uniform) {
  const float x = int8_clamp(normalized);
  const float nearest = (x + 12582912.0f) - 12582912.0f;
  const float low = nearest > x ? nearest - 1.0f : nearest;
  return int8_byte(low + (x - low > uniform ? 1.0f : 0.0f));
}

USAF_HD float int8_decode(uint32_t code) { return static_cast<float>(static_cast<int8_t>(code)); }

}  // namespace usaf

// fp8: e4m3fn codes (1 sign, 4 exponent and 3 mantissa bits, bias 7, no infinities, largest 448; OCP 8-bit floating
// point specification 1.0) with one fp32 scale per block of 64 weights.
//
// Formula: scale = step = absmax / 448; code = e4m3fn(w * inverse_step(step)), ties to even, saturating at +-448, never
// NaN; decode = value(code) * step in fp32. Signs of zero survive. A block of zeros has scale 0.
#pragma once
#include <cstdint>

#include "float_bits.h"
#include "host_device.h"

namespace usaf {

inline constexpr float kFp8Max = 448.0f;

USAF_HD float fp8_step(float absmax) { return absmax / kFp8Max; }

// NaN becomes 448: every input has a code that is a number.
USAF_HD float fp8_clamped_magnitude(float normalized) {
  const float magnitude = bits_float(float_bits(normalized) & 0x7fffffffu);
  return magnitude < kFp8Max ? magnitude : kFp8Max;
}

USAF_HD uint32_t fp8_sign(float normalized) { return (float_bits(normalized) >> 24) & 0x80u; }

inline constexpr uint32_t kFp8Rebias = (127u - 7u) << 3;  // of an fp32 exponent above 3 mantissa bits
inline constexpr float kFp8SmallestNormal = 0.015625f;    // 2^-6; below it the step is 2^-9
inline constexpr float kFp8SubnormalRounder = 16384.0f;   // 2^14: its last bit is worth 2^-9

USAF_HD uint32_t fp8_encode(float normalized) {
  const float magnitude = fp8_clamped_magnitude(normalized);
  const uint32_t bits = float_bits(magnitude);
  const uint32_t normal = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - kFp8Rebias;
  const uint32_t subnormal = float_bits(magnitude + kFp8SubnormalRounder) - float_bits(kFp8SubnormalRounder);
  return (magnitude < kFp8SmallestNormal ? subnormal : normal) | fp8_sign(normalized);
}

// Stochastic rounding to one of the two neighbouring codes, away from zero with a probability equal to the fraction
// between them. The high 20 bits of `random` decide.
USAF_HD uint32_t fp8_encode_stochastic(float normalized, uint32_t random) {
  const float magnitude = fp8_clamped_magnitude(normalized);
  const bool small = magnitude < kFp8SmallestNormal;
  // Above a subnormal, 2^-6 has the same spacing of codes, and one subtraction takes it off again.
  const uint32_t bits = float_bits(small ? magnitude + kFp8SmallestNormal : magnitude);
  const uint32_t rebias = kFp8Rebias + (small ? 8u : 0u);
  return (((bits + (random >> 12)) >> 20) - rebias) | fp8_sign(normalized);
}

USAF_HD float fp8_decode(uint32_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const uint32_t normal = (magnitude + kFp8Rebias) << 20;
  const uint32_t subnormal =
      float_bits(bits_float((magnitude << 20) + float_bits(kFp8SmallestNormal)) - kFp8SmallestNormal);
  uint32_t bits = magnitude < 8u ? subnormal : normal;
  bits = magnitude == 0x7fu ? 0x7fc00000u : bits;
  return bits_float(bits | (code & 0x80u) << 24);
}

}  // namespace usaf

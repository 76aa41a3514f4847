// 8-bit error feedback: the rounding error of an encode, kept in one signed byte a weight and added back before the
// next step (Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014, kept a quantiser's error for the next
// step in this way; Karimireddy et al., arXiv 1901.09847, analyse it).
//
// Formula: weight = value(code) * step + residual * unit, unit = gap(code) * step / 127, where gap(code) is half the
// way to the farther neighbour of the code. Rounding to nearest errs by at most that, so 127 units hold every error,
// and the unit is as fine as the code's own surroundings allow: absmax / 840 (outermost) to absmax / 3191 (innermost)
// for NF4, absmax / 32258 for int8, and 1 / 254 of the number's own last place for fp8 and bf16.
#pragma once
#include <cstdint>

#include "bfloat16.h"
#include "formats.h"
#include "host_device.h"
#include "nf4.h"

namespace usaf {

inline constexpr float kResidualLimit = 127.0f;

USAF_HD constexpr float nf4_gap(int code) {
  const float below = code == 0 ? 0.0f : nf4_value(code) - nf4_value(code - 1);
  const float above = code == 15 ? 0.0f : nf4_value(code + 1) - nf4_value(code);
  return 0.5f * (below > above ? below : above);
}

// Half of a bfloat16's last place; of 2^-95's where the number is smaller, so that no unit is subnormal.
USAF_HD float bf16_gap(Bf16 code) {
  const uint32_t exponent = (code.bits >> 7) & 0xffu;
  return bits_float(((exponent > 32u ? exponent : 32u) - 8u) << 23);
}

// Never 0, so that a block of zeros divides.
USAF_HD float residual_unit(float gap, float step) {
  const float unit = gap * step * (1.0f / kResidualLimit);
  return unit > 1e-38f ? unit : 1e-38f;
}

// To the nearest unit, ties to even; an error that is no number becomes -127.
USAF_HD int32_t residual_encode(float error, float unit) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  float units = error / unit;
  units = units >= -kResidualLimit ? units : -kResidualLimit;
  units = units <= kResidualLimit ? units : kResidualLimit;
  return static_cast<int32_t>(float_bits(units + kShift) - float_bits(kShift));
}

}  // namespace usaf

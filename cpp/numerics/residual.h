// 8-bit error feedback: the rounding error of an encode, kept in one signed byte a weight and added back before the
// next step (Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014, kept a quantiser's error for the next
// step in this way; Karimireddy et al., arXiv 1901.09847, analyse it).
//
// Formula: weight = value(code) * step + residual * unit, unit = gap(code) * step / 127, where gap(code) is half the
// way to the farther neighbour of the code. Rounding to nearest errs by at most that, so 127 units hold every error,
// and the unit is as fine as the code's own surroundings allow: absmax / 840 (outermost) to absmax / 3191 (around 0)
// for NF4, absmax / 32258 for int8, 1 / 254 of the code's own last place for fp8 and bf16.
#pragma once
#include <cstdint>

#include "bfloat16.h"
#include "float_bits.h"
#include "formats.h"
#include "host_device.h"
#include "nf4.h"

namespace usaf {

inline constexpr float kResidualLimit = 127.0f;
inline constexpr float kMinResidualUnit = 1e-38f;  // so that a block of zeros divides

USAF_HD constexpr float nf4_gap(int code) {
  const float below = code == 0 ? 0.0f : nf4_value(code) - nf4_value(code - 1);
  const float above = code == 15 ? 0.0f : nf4_value(code + 1) - nf4_value(code);
  return 0.5f * (below > above ? below : above);
}

// In steps; for bf16 in weights. bf16 codes below 2^-95 take the gap of 2^-95, so that no unit is subnormal.
template <Format kFormat>
USAF_HD float residual_gap(uint32_t code) {
  if constexpr (is_nf4(kFormat)) {
    constexpr float gaps[16] = {nf4_gap(0),  nf4_gap(1),  nf4_gap(2),  nf4_gap(3), nf4_gap(4),  nf4_gap(5),
                                nf4_gap(6),  nf4_gap(7),  nf4_gap(8),  nf4_gap(9), nf4_gap(10), nf4_gap(11),
                                nf4_gap(12), nf4_gap(13), nf4_gap(14), nf4_gap(15)};
    return gaps[code];
  } else if constexpr (kFormat == Format::int8) {
    return 0.5f;
  } else if constexpr (kFormat == Format::fp8) {
    const uint32_t exponent = (code >> 3) & 0xfu;
    return bits_float(((exponent > 1u ? exponent : 1u) + 127u - 7u - 4u) << 23);
  } else {
    const uint32_t exponent = (code >> 7) & 0xffu;
    return bits_float(((exponent > 32u ? exponent : 32u) - 8u) << 23);
  }
}

USAF_HD float residual_unit(float gap, float step) {
  const float unit = gap * step * (1.0f / kResidualLimit);
  return unit > kMinResidualUnit ? unit : kMinResidualUnit;
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

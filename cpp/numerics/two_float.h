// A sum of squares as two fp32 numbers, for chips whose double precision is slow: the error of every product and sum is
// found exactly (Dekker, "A floating-point technique for extending the available precision", 1971; Knuth's TwoSum) and
// kept in the second. Of a few squares it is as good as a sum in double.
#pragma once
#include <cstdint>

#include "float_bits.h"
#include "host_device.h"

namespace usaf {

struct TwoFloat {
  float high, low;
};

// Whether squares of numbers up to this magnitude (in bits) neither overflow nor lose what counts: it lies in
// [2^-40, 2^60), or is 0.
USAF_HD bool two_float_holds_squares(uint32_t largest) {
  constexpr uint32_t kLow = (127u - 40u) << 23, kHigh = (127u + 60u) << 23;
  return largest == 0 || largest - kLow < kHigh - kLow;
}

// kHalf: x has at most 12 bits, as bf16 and fp16 do, so its square is exact.
template <bool kHalf>
USAF_HD void add_square(TwoFloat& sum, float x) {
  const float square = x * x;
  float error = 0.0f;
  if constexpr (!kHalf) {
    const float high = bits_float(float_bits(x) & 0xfffff000u), low = x - high;  // 12 bits each
    error = ((high * high - square) + 2.0f * (high * low)) + low * low;
  }
  const float total = sum.high + square, added = total - sum.high;
  sum.low += ((sum.high - (total - added)) + (square - added)) + error;
  sum.high = total;
}

}  // namespace usaf

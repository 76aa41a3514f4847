// NF4: 4-bit NormalFloat with one absmax per block of 64 weights, fp32 or (nf4_f16) fp16.
//
// Formula: absmax = max |w|; code = index of the table entry nearest to w * (1 / max(absmax, 1e-38)), ties to the lower
// index; decode = table[code] * absmax in fp32. With an fp16 absmax, that of the block rounded up to fp16 takes its
// place everywhere. The table is the published one (Dettmers et al., QLoRA, arXiv
// 2305.14314, appendix E). Full blocks equal bitsandbytes' quantize_4bit byte for byte; a short block follows the same
// formula. The first weight of a pair stands in the high nibble; nibbles and bytes past the row's end are 0. A block of
// zeros has absmax 0 and code 7. A block with a NaN or an infinity has that as its absmax, so it decodes to no number.
#pragma once
#include <cstdint>

#include "float_bits.h"
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

// The bound between codes `i` and `i + 1`. A constant when `i` is one.
USAF_HD constexpr float nf4_threshold(int i) {
  constexpr float values[16] = {USAF_NF4_VALUES};
  return (values[i] + values[i + 1]) * 0.5f;
}

USAF_HD constexpr float nf4_value(int i) {
  constexpr float values[16] = {USAF_NF4_VALUES};
  return values[i];
}

// Where the code of weight `i` of a pack stands in the little-endian word that holds the pack's codes, in bits.
USAF_HD constexpr int nf4_shift(int i) { return 4 * (i ^ 1); }
static_assert(nf4_shift(0) == 4 && nf4_shift(1) == 0 && nf4_shift(2) == 12 && nf4_shift(3) == 8);

// The nibbles of the first `count` weights of a pack of 8.
USAF_HD constexpr uint32_t nf4_mask(int count) {
  if (count >= 8) return 0xffffffffu;
  return (1u << 4 * (count & 6)) - 1u + (count & 1 ? 0xf0u << 4 * (count & 6) : 0u);
}
static_assert(nf4_mask(0) == 0 && nf4_mask(1) == 0xf0u && nf4_mask(2) == 0xffu && nf4_mask(7) == 0xf0ffffffu);

// `normalized` = w * inverse_step(absmax). A bisection over the bounds: four compares and selects, no memory read,
// no branch. Written as selects of values, which every compiler vectorises; logic on bools it does not.
USAF_HD uint32_t nf4_encode(float normalized) {
  const float x = normalized;
  const float t3 = nf4_threshold(7);
  const float t2 = x > t3 ? nf4_threshold(11) : nf4_threshold(3);
  const float t1_low = x > t2 ? nf4_threshold(5) : nf4_threshold(1);
  const float t1_high = x > t2 ? nf4_threshold(13) : nf4_threshold(9);
  const float t1 = x > t3 ? t1_high : t1_low;
  const float t0_00 = x > t1 ? nf4_threshold(2) : nf4_threshold(0);
  const float t0_01 = x > t1 ? nf4_threshold(6) : nf4_threshold(4);
  const float t0_10 = x > t1 ? nf4_threshold(10) : nf4_threshold(8);
  const float t0_11 = x > t1 ? nf4_threshold(14) : nf4_threshold(12);
  const float t0_low = x > t2 ? t0_01 : t0_00;
  const float t0_high = x > t2 ? t0_11 : t0_10;
  const float t0 = x > t3 ? t0_high : t0_low;
  return (x > t3 ? 8u : 0u) + (x > t2 ? 4u : 0u) + (x > t1 ? 2u : 0u) + (x > t0 ? 1u : 0u);
}

// nf4_encode as a table lookup, for machines with a fast one: of the bins around the multiples of 1/16, none holds more
// than one bound, so a weight's bin leaves one compare. Adding kNf4LookupShift rounds to a multiple of 1/16 whose low
// bits are the bin. 1 and -1 are 32 bins apart: with 32 of them min(x, kNf4LookupMax) is taken first, which changes no
// code.
template <int kBins>
struct Nf4Lookup {
  uint32_t base[kBins];  // the code below the bin's bound
  float bound[kBins];    // infinite where the bin has none
};

inline constexpr float kNf4LookupMax = 0.9375f;
inline constexpr float kNf4LookupShift = 786432.0f;  // 1.5 * 2^19: its last bit is worth 1/16

constexpr int nf4_bin_of_bound(int i) {
  const double sixteenths = static_cast<double>(nf4_threshold(i)) * 16.0 + 16.5;  // of -1, and half a bin
  return static_cast<int>(sixteenths) - 16;
}

template <int kBins>
constexpr Nf4Lookup<kBins> make_nf4_lookup() {
  Nf4Lookup<kBins> lookup{};
  uint32_t code = 0;
  for (int bin = -kBins / 2; bin < kBins / 2; ++bin) {
    lookup.base[bin & (kBins - 1)] = code;
    lookup.bound[bin & (kBins - 1)] = __builtin_huge_valf();
    if (code < 15 && nf4_bin_of_bound(static_cast<int>(code)) == bin) {
      lookup.bound[bin & (kBins - 1)] = nf4_threshold(static_cast<int>(code));
      ++code;
    }
  }
  return lookup;
}

inline constexpr auto kNf4Lookup32 = make_nf4_lookup<32>();
inline constexpr auto kNf4Lookup64 = make_nf4_lookup<64>();
static_assert(kNf4Lookup32.base[15] == 15 && kNf4Lookup64.base[16] == 15, "every bound has a bin of its own");

// For GPUs, with the table in shared memory, where of the bins that occur only those of 1 and -1 share a bank. Of a
// block that is not finite any code may come.
USAF_HD uint32_t nf4_encode(const Nf4Lookup<64>& lookup, float normalized) {
  const uint32_t bin = float_bits(normalized + kNf4LookupShift) & 63u;
  return lookup.base[bin] + (normalized > lookup.bound[bin] ? 1u : 0u);
}

// Stochastic rounding to one of the two neighbouring codes, the upper one with probability (x - low) / (high - low):
// unbiased between them. `uniform` is in [0, 1). A bisection over the table, in the same style.
USAF_HD uint32_t nf4_encode_stochastic(float normalized, float uniform) {
  const float x = normalized > 1.0f ? 1.0f : normalized;  // w * (1 / absmax) may round to just above 1
  const float t3 = nf4_value(8);
  const float t2 = x >= t3 ? nf4_value(12) : nf4_value(4);
  const float t1_low = x >= t2 ? nf4_value(6) : nf4_value(2);
  const float t1_high = x >= t2 ? nf4_value(14) : nf4_value(10);
  const float t1 = x >= t3 ? t1_high : t1_low;
  const float t0_00 = x >= t1 ? nf4_value(3) : nf4_value(1);
  const float t0_01 = x >= t1 ? nf4_value(7) : nf4_value(5);
  const float t0_10 = x >= t1 ? nf4_value(11) : nf4_value(9);
  const float t0_11 = x >= t1 ? nf4_value(15) : nf4_value(13);
  const float t0_low = x >= t2 ? t0_01 : t0_00;
  const float t0_high = x >= t2 ? t0_11 : t0_10;
  const float t0 = x >= t3 ? t0_high : t0_low;
  // The largest bound passed and the smallest one missed are the neighbours. At code 15 both are 1: nothing is above.
  float low = x >= t3 ? t3 : nf4_value(0), high = x >= t3 ? nf4_value(15) : t3;
  low = x >= t2 ? t2 : low;
  high = x >= t2 ? high : t2;
  low = x >= t1 ? t1 : low;
  high = x >= t1 ? high : t1;
  low = x >= t0 ? t0 : low;
  high = x >= t0 ? high : t0;
  const uint32_t code = (x >= t3 ? 8u : 0u) + (x >= t2 ? 4u : 0u) + (x >= t1 ? 2u : 0u) + (x >= t0 ? 1u : 0u);
  return code + (x - low > uniform * (high - low) ? 1u : 0u);
}

}  // namespace usaf

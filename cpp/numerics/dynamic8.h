// 8-bit block-wise moments in bitsandbytes' format: a dynamic 8-bit map and one fp32 absmax per block of 256 along the
// row, the last one short (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861).
//
// Map: seven decades 10^-6 .. 10^0; decade i holds the 2^i (signed) or 2^(i+1) (unsigned) midpoints of equal parts of
// [0.1, 1]; beside them 0 and 1; signed: the decades' negatives too. Evaluated with the roundings of bitsandbytes'
// create_dynamic_map, whose 256 floats it equals.
//
// Formula: code = number of bounds below x * (1 / max(absmax, 1e-38)), the bounds being the fp32 middles of neighbours;
// decode = map[code] * absmax. This is bitsandbytes' reference (its default backend) and its CUDA kernel; its CPU
// kernel for fp32 looks codes up in 2^16 equal bins of [-1, 1] instead, in which a 0 becomes 2e-5 * absmax: an exp_avg
// that drifts, so it is not followed. A block with a NaN or an infinity has that as its absmax: it decodes to no
// number.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "block_scale.h"
#include "host_device.h"

namespace usaf {

inline constexpr int64_t kMomentBlock = 256;  // moments per absmax

USAF_HD constexpr int64_t num_moment_blocks(int64_t cols) { return (cols + kMomentBlock - 1) / kMomentBlock; }

struct Dynamic8 {
  float value[256];
  float bound[255];  // x belongs to the number of bounds below it
};

namespace detail {

// Point k of n equal parts of [0.1, 1] as torch.linspace gives it: a fused multiply-add from the nearer end.
constexpr float tenth_to_one(int k, int n) {
  const float step = (1.0f - 0.1f) / static_cast<float>(n);
  return k < (n + 1) / 2 ? static_cast<float>(double{0.1f} + double{step} * k)
                         : static_cast<float>(1.0 - double{step} * (n - k));
}

constexpr Dynamic8 make_dynamic8(bool is_signed) {
  constexpr float kDecades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  Dynamic8 map{};
  const int zero = is_signed ? 127 : 0;
  int code = zero;
  map.value[code++] = 0.0f;
  for (int i = 0; i < 7; ++i) {
    const int parts = is_signed ? 1 << i : 2 << i;
    for (int k = 0; k < parts; ++k) {
      map.value[code++] = kDecades[i] * ((tenth_to_one(k, parts) + tenth_to_one(k + 1, parts)) / 2.0f);
    }
  }
  map.value[code] = 1.0f;
  for (int i = 0; i < zero; ++i) map.value[i] = -map.value[2 * zero - i];
  for (int i = 0; i < 255; ++i) map.bound[i] = (map.value[i] + map.value[i + 1]) / 2.0f;
  return map;
}

}  // namespace detail

inline constexpr Dynamic8 kDynamic8Signed = detail::make_dynamic8(true);     // exp_avg
inline constexpr Dynamic8 kDynamic8Unsigned = detail::make_dynamic8(false);  // exp_avg_sq
static_assert(kDynamic8Signed.value[127] == 0.0f && kDynamic8Signed.value[255] == 1.0f);
static_assert(kDynamic8Unsigned.value[0] == 0.0f && kDynamic8Unsigned.value[255] == 1.0f);

// `normalized` = x * inverse_step(absmax). A bisection over the bounds.
USAF_HD uint32_t dynamic8_encode(const Dynamic8& map, float normalized) {
  uint32_t code = 0;
  for (uint32_t bit = 128; bit != 0; bit >>= 1) code += normalized > map.bound[code + bit - 1] ? bit : 0u;
  return code;
}

// dynamic8_encode as two lookups, for GPUs, which keep the tables in shared memory. Numbers with the same leading bits
// share a bin, and no bin holds more than one positive bound: those below a bin's smallest number are passed, and one
// compare is left. Negative numbers mirror it, since bound[126 - i] is -bound[127 + i] in the signed map.
template <bool kSigned>
struct Dynamic8Lookup {
  static constexpr int kZero = kSigned ? 127 : 0;                       // the code of 0
  static constexpr int kShift = kSigned ? 17 : 16;                      // 64 or 128 bins an octave
  static constexpr float kSmallest = 1.0f / 8388608.0f;                 // 2^-23 is below every positive bound
  static constexpr float kLowest = kSigned ? -0.99999994f : kSmallest;  // what is below has code 0 too
  static constexpr uint32_t kFirstBin = (127u - 23u) << (23 - kShift), kLastBin = 127u << (23 - kShift);  // that of 1

  float value[256];
  float bound[257];                          // those of Dynamic8 between two infinities
  uint8_t passed[kLastBin - kFirstBin + 4];  // positive bounds below a bin; three bytes to fill up a word
};

template <bool kSigned>
constexpr Dynamic8Lookup<kSigned> make_dynamic8_lookup(const Dynamic8& map) {
  using Lookup = Dynamic8Lookup<kSigned>;
  Lookup lookup{};
  for (int i = 0; i < 256; ++i) lookup.value[i] = map.value[i];
  for (int i = 0; i < 255; ++i) lookup.bound[i + 1] = map.bound[i];
  lookup.bound[0] = -__builtin_huge_valf();
  lookup.bound[256] = __builtin_huge_valf();
  int passed = 0;
  for (uint32_t bin = Lookup::kFirstBin; bin <= Lookup::kLastBin; ++bin) {
    const auto smallest = std::bit_cast<float>(bin << Lookup::kShift);
    while (lookup.bound[Lookup::kZero + passed + 1] < smallest) ++passed;
    lookup.passed[bin - Lookup::kFirstBin] = static_cast<uint8_t>(passed);
  }
  return lookup;
}

template <bool kSigned>
constexpr bool dynamic8_lookup_fits(const Dynamic8Lookup<kSigned>& lookup) {
  constexpr uint32_t kBins = Dynamic8Lookup<kSigned>::kLastBin - Dynamic8Lookup<kSigned>::kFirstBin + 1;
  bool fits = lookup.passed[0] == 0;
  for (uint32_t i = 1; i < kBins; ++i) fits = fits && lookup.passed[i] - lookup.passed[i - 1] <= 1;
  for (int i = 0; kSigned && i < 127; ++i) fits = fits && lookup.bound[127 - i] == -lookup.bound[128 + i];
  return fits;
}

inline constexpr auto kDynamic8SignedLookup = make_dynamic8_lookup<true>(kDynamic8Signed);
inline constexpr auto kDynamic8UnsignedLookup = make_dynamic8_lookup<false>(kDynamic8Unsigned);
static_assert(dynamic8_lookup_fits(kDynamic8SignedLookup) && dynamic8_lookup_fits(kDynamic8UnsignedLookup));
static_assert(sizeof(kDynamic8SignedLookup) == 3528 && sizeof(kDynamic8UnsignedLookup) == 5000);

template <bool kSigned>
USAF_HD uint32_t dynamic8_encode(const Dynamic8Lookup<kSigned>& lookup, float normalized) {
  using Lookup = Dynamic8Lookup<kSigned>;
  const float x = fminf(fmaxf(normalized, Lookup::kLowest), 1.0f);  // NaN becomes the lowest: code 0, as above
  const uint32_t bin = float_bits(kSigned ? fmaxf(fabsf(x), Lookup::kSmallest) : x) >> Lookup::kShift;
  const int32_t sign = kSigned ? static_cast<int32_t>(float_bits(x)) >> 31 : 0;  // -1 or 0
  const int32_t code = Lookup::kZero + (lookup.passed[bin - Lookup::kFirstBin] ^ sign);
  return static_cast<uint32_t>(code + (x > lookup.bound[code + 1] ? 1 : 0));
}

}  // namespace usaf

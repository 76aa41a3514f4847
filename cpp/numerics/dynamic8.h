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

}  // namespace usaf

// Block-wise 8-bit moments: one block at a time, and whole tensors for readers.
#include "moments8.h"

#include <algorithm>
#include <cstring>

#include "../kernel_api.h"
#include "parallel.h"

namespace usaf::cpu {

USAF_CLONES void decode_moments(const Dynamic8& map, const uint8_t* __restrict codes, float absmax, int64_t count,
                                float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = map.value[codes[i]] * absmax;
}

USAF_CLONES float encode_moments(const Dynamic8& map, const float* __restrict moments, int64_t count,
                                 uint8_t* __restrict codes) {
  uint32_t largest = 0;  // as ordered bits: a NaN above infinity above every number
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, float_bits(moments[i]) & 0x7fffffffu);
  const float absmax = bits_float(largest);
  const float inverse = dynamic8_inverse_scale(absmax);
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(dynamic8_encode(map, moments[i] * inverse));
  return absmax;
}

void decode_moments8(const DecodeMoments8Args& args, void*) {
  const Dynamic8& map = args.is_signed ? kDynamic8Signed : kDynamic8Unsigned;
  const int64_t blocks = num_moment_blocks(args.cols);
  parallel_for(args.num_rows, args.cols, [&](int64_t r) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t start = block * kMomentBlock, element = r * args.cols + start;
      decode_moments(map, args.codes + element, args.absmax[r * blocks + block],
                     std::min(kMomentBlock, args.cols - start), args.out + element);
    }
  });
}

}  // namespace usaf::cpu

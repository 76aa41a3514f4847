// Block-wise 8-bit moments: one block at a time, and whole tensors for readers.
#include "moments8.h"

#include <algorithm>

#include "../kernel_api.h"
#include "isa.h"
#include "moments8_avx512.h"
#include "parallel.h"

namespace usaf::cpu {
namespace {

const Dynamic8& map_of(bool is_signed) { return is_signed ? kDynamic8Signed : kDynamic8Unsigned; }

#ifdef USAF_HAS_ISA_LEVELS
// How many of `count` moments the vector path takes.
int64_t vectorised(int64_t count) { return isa() == Isa::avx512 ? count / 32 * 32 : 0; }
#endif

}  // namespace

void decode_moments(bool is_signed, const uint8_t* codes, float absmax, int64_t count, float* out) {
  int64_t done = 0;
#ifdef USAF_HAS_ISA_LEVELS
  done = vectorised(count);
  if (done != 0) decode_moments_avx512(is_signed ? kSignedVectors : kUnsignedVectors, codes, absmax, done, out);
#endif
  const Dynamic8& map = map_of(is_signed);
  for (int64_t i = done; i < count; ++i) out[i] = map.value[codes[i]] * absmax;
}

float encode_moments(bool is_signed, const float* moments, int64_t count, uint8_t* codes) {
  uint32_t largest = 0;  // as ordered bits: a NaN above infinity above every number
  int64_t done = 0;
#ifdef USAF_HAS_ISA_LEVELS
  done = vectorised(count);
  if (done != 0) largest = largest_moment_avx512(moments, done);
#endif
  for (int64_t i = done; i < count; ++i) largest = std::max(largest, magnitude_bits(moments[i]));
  const float absmax = bits_float(largest), inverse = inverse_step(absmax);
#ifdef USAF_HAS_ISA_LEVELS
  if (done != 0) encode_moments_avx512(is_signed ? kSignedVectors : kUnsignedVectors, moments, inverse, done, codes);
#endif
  const Dynamic8& map = map_of(is_signed);
  for (int64_t i = done; i < count; ++i) codes[i] = static_cast<uint8_t>(dynamic8_encode(map, moments[i] * inverse));
  return absmax;
}

void decode_moments8(const DecodeMoments8Args& args, void*) {
  const int64_t blocks = num_moment_blocks(args.cols);
  parallel_for(args.num_rows, args.cols, [&](int64_t r) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t start = block * kMomentBlock, element = r * args.cols + start;
      decode_moments(args.is_signed, args.codes + element, args.absmax[r * blocks + block],
                     std::min(kMomentBlock, args.cols - start), args.out + element);
    }
  });
}

}  // namespace usaf::cpu

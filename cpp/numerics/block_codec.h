// The block formats behind one interface, for kernels that are templates over the format:
//   Scale                        what is stored for a block
//   make_scale(absmax)           from the block's largest magnitude
//   step(scale)                  what a code's value is multiplied by
//   encode(normalized)           the code of w * inverse_step(step), to nearest
//   encode_stochastic(normalized, random)   unbiased between the two neighbours; 32 random bits
//   value(code)                  w is value(code) * step, in fp32
#pragma once
#include <cstdint>

#include "block_scale.h"
#include "float16.h"
#include "formats.h"
#include "fp8.h"
#include "host_device.h"
#include "int8.h"
#include "nf4.h"
#include "rng.h"

namespace usaf {

template <Format kFormat>
struct BlockCodec;

template <>
struct BlockCodec<Format::nf4> {
  using Scale = float;
  USAF_HD static Scale make_scale(float absmax) { return absmax; }
  USAF_HD static float step(Scale scale) { return scale; }
  USAF_HD static uint32_t encode(float normalized) { return nf4_encode(normalized); }
  USAF_HD static uint32_t encode_stochastic(float normalized, uint32_t random) {
    return nf4_encode_stochastic(normalized, to_uniform(random));
  }
  USAF_HD static float value(uint32_t code) { return nf4_value(static_cast<int>(code)); }
};

// The absmax is rounded up, so that no weight lies outside the table: it would be clipped, and stochastic rounding
// would be biased there. Infinite above 65504, which is refused at quantisation.
template <>
struct BlockCodec<Format::nf4_f16> : BlockCodec<Format::nf4> {
  using Scale = F16;
  USAF_HD static Scale make_scale(float absmax) { return to_f16_up(absmax); }
  USAF_HD static float step(Scale scale) { return to_float(scale); }
};

template <>
struct BlockCodec<Format::int8> {
  using Scale = float;
  USAF_HD static Scale make_scale(float absmax) { return absmax; }
  USAF_HD static float step(Scale scale) { return int8_step(scale); }
  USAF_HD static uint32_t encode(float normalized) { return int8_encode(normalized); }
  USAF_HD static uint32_t encode_stochastic(float normalized, uint32_t random) {
    return int8_encode_stochastic(normalized, to_uniform(random));
  }
  USAF_HD static float value(uint32_t code) { return int8_decode(code); }
};

template <>
struct BlockCodec<Format::fp8> {
  using Scale = float;
  USAF_HD static Scale make_scale(float absmax) { return fp8_step(absmax); }
  USAF_HD static float step(Scale scale) { return scale; }
  USAF_HD static uint32_t encode(float normalized) { return fp8_encode(normalized); }
  USAF_HD static uint32_t encode_stochastic(float normalized, uint32_t random) {
    return fp8_encode_stochastic(normalized, random);
  }
  USAF_HD static float value(uint32_t code) { return fp8_decode(code); }
};

// What kernels of every format declare. bf16 has no scales, and its kernels use nothing of the type.
template <Format kFormat>
struct ScaleOf {
  using type = typename BlockCodec<kFormat>::Scale;
};
template <>
struct ScaleOf<Format::bf16> {
  using type = float;
};

}  // namespace usaf

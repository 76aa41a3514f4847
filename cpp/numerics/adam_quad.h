// Four neighbouring weights of a masked Adam step, as one GPU lane sees them between its loads and its stores. Both GPU
// backends are made of these: what they do themselves is move data and find the absmax of a block among its lanes.
//
// Codes are the low 4 * code_bits(format) bits of a word, in the order of memory. Of the four weights the first `count`
// exist; what is past a row's end is kept at zero, so that no absmax sees it.
#pragma once
#include <cstdint>
#include <type_traits>

#include "adam.h"
#include "bfloat16.h"
#include "block_codec.h"
#include "dynamic8.h"
#include "residual.h"

namespace usaf {

inline constexpr int kQuad = 4;
static_assert(kQuad == kRandomsPerGroup);

// NF4's values, residual gaps and codes, for a kernel to keep in shared memory: there an index known only at run time
// is cheap, and a constant array inside a function would lie in local memory.
struct Nf4Tables {
  float value[16], gap[16];
  Nf4Lookup<64> lookup;
};

constexpr Nf4Tables make_nf4_tables() {
  Nf4Tables tables{};
  for (int code = 0; code < 16; ++code) {
    tables.value[code] = nf4_value(code);
    tables.gap[code] = nf4_gap(code);
  }
  tables.lookup = kNf4Lookup64;
  return tables;
}

inline constexpr Nf4Tables kNf4Tables = make_nf4_tables();

// The codes of four weights, and no more bits: 64 would be two registers and twice the instructions.
template <Format kFormat>
using QuadCodes = std::conditional_t<kFormat == Format::bf16, uint64_t, uint32_t>;

struct AdamQuad {
  float weight[kQuad], exp_avg[kQuad], exp_avg_sq[kQuad];
};

template <Format kFormat>
USAF_HD constexpr int quad_shift(int i) {
  return is_nf4(kFormat) ? nf4_shift(i) : i * static_cast<int>(code_bits(kFormat));
}

template <Format kFormat>
USAF_HD uint32_t quad_code(QuadCodes<kFormat> codes, int i) {
  return static_cast<uint32_t>(codes >> quad_shift<kFormat>(i)) & ((1u << code_bits(kFormat)) - 1u);
}

// The bytes that the codes of `count` weights are in.
template <Format kFormat>
USAF_HD QuadCodes<kFormat> quad_code_mask(int count) {
  constexpr int kBits = 8 * sizeof(QuadCodes<kFormat>);
  const int used = static_cast<int>(used_bytes(kFormat, count));
  return count == 0 ? 0 : ~QuadCodes<kFormat>{0} >> (kBits - 8 * used);
}

// `step`: BlockCodec's; of bf16 it is not used.
template <Format kFormat>
USAF_HD float code_weight(uint32_t code, float step, const Nf4Tables& tables) {
  if constexpr (kFormat == Format::bf16) {
    return to_float(Bf16{static_cast<uint16_t>(code)});
  } else if constexpr (is_nf4(kFormat)) {
    return tables.value[code] * step;
  } else {
    return BlockCodec<kFormat>::value(code) * step;
  }
}

template <Format kFormat>
USAF_HD float code_residual_unit(uint32_t code, float step, const Nf4Tables& tables) {
  if constexpr (is_nf4(kFormat)) {
    return residual_unit(tables.gap[code], step);
  } else {
    return residual_unit(residual_gap<kFormat>(code), kFormat == Format::bf16 ? 1.0f : step);
  }
}

// What codes, and in mode residual the bytes of `residuals`, stand for.
template <Format kFormat, AdamMode kMode>
USAF_HD void decode_quad(QuadCodes<kFormat> codes, uint32_t residuals, float step, const Nf4Tables& tables,
                         float (&weight)[kQuad]) {
  for (int i = 0; i < kQuad; ++i) {
    const uint32_t code = quad_code<kFormat>(codes, i);
    weight[i] = code_weight<kFormat>(code, step, tables);
    if constexpr (kMode == AdamMode::residual) {
      const auto residual = static_cast<float>(static_cast<int8_t>(residuals >> 8 * i));
      weight[i] = weight[i] + residual * code_residual_unit<kFormat>(code, step, tables);
    }
  }
}

USAF_HD void step_quad(const AdamScalars& scalars, float grad_scale, const float (&grad)[kQuad], int count,
                       AdamQuad& quad) {
  for (int i = 0; i < kQuad; ++i) {
    const AdamState next =
        adam_step(scalars, {quad.weight[i], quad.exp_avg[i], quad.exp_avg_sq[i]}, grad[i] * grad_scale);
    quad.weight[i] = i < count ? next.weight : 0.0f;
    quad.exp_avg[i] = i < count ? next.exp_avg : 0.0f;
    quad.exp_avg_sq[i] = i < count ? next.exp_avg_sq : 0.0f;
  }
}

USAF_HD uint32_t quad_magnitude(const float (&value)[kQuad]) {
  uint32_t largest = 0;
  for (int i = 0; i < kQuad; ++i) {
    largest = magnitude_bits(value[i]) > largest ? magnitude_bits(value[i]) : largest;
  }
  return largest;
}

// The numbers of elements first .. first + 3.
USAF_HD Random4 random_quad(uint64_t seed, int32_t step, int64_t first) {
  const auto group = static_cast<uint64_t>(first / kRandomsPerGroup);
  const auto skip = static_cast<int>(first % kRandomsPerGroup);
  Random4 low = random_group(seed, step, group);
  if (skip == 0) return low;
  Random4 high = random_group(seed, step, group + 1);
  if (skip & 1) {
    low = {{low.value[1], low.value[2], low.value[3], high.value[0]}};
    high = {{high.value[1], high.value[2], high.value[3], 0}};
  }
  if (skip & 2) low = {{low.value[2], low.value[3], high.value[0], high.value[1]}};
  return low;
}

// `random` null: to nearest. `inverse`: of the step; of bf16 it is not used.
template <Format kFormat>
USAF_HD QuadCodes<kFormat> encode_quad(const float (&weight)[kQuad], float inverse, const Random4* random, int count,
                                       const Nf4Tables& tables) {
  QuadCodes<kFormat> codes = 0;
  for (int i = 0; i < kQuad; ++i) {
    uint32_t code;
    if constexpr (kFormat == Format::bf16) {
      code = random ? to_bf16_stochastic(weight[i], random->value[i]).bits : to_bf16(weight[i]).bits;
    } else {
      const float normalized = weight[i] * inverse;
      if (random) {
        code = BlockCodec<kFormat>::encode_stochastic(normalized, random->value[i]);
      } else if constexpr (is_nf4(kFormat)) {
        code = nf4_encode(tables.lookup, normalized);
      } else {
        code = BlockCodec<kFormat>::encode(normalized);
      }
    }
    codes |= static_cast<QuadCodes<kFormat>>(i < count ? code : 0u) << quad_shift<kFormat>(i);
  }
  return codes;
}

// What `codes` lack of `weight`, as residuals: the low byte for the first weight.
template <Format kFormat>
USAF_HD uint32_t encode_residual_quad(const float (&weight)[kQuad], QuadCodes<kFormat> codes, float step,
                                      const Nf4Tables& tables) {
  uint32_t residuals = 0;
  for (int i = 0; i < kQuad; ++i) {
    const uint32_t code = quad_code<kFormat>(codes, i);
    const float error = weight[i] - code_weight<kFormat>(code, step, tables);
    const int32_t residual = residual_encode(error, code_residual_unit<kFormat>(code, step, tables));
    residuals |= (static_cast<uint32_t>(residual) & 0xffu) << 8 * i;
  }
  return residuals;
}

// Mode eco: what the encode lost goes into exp_avg.
template <Format kFormat>
USAF_HD void carry_error_quad(const AdamScalars& scalars, QuadCodes<kFormat> codes, float step, const Nf4Tables& tables,
                              int count, AdamQuad& quad) {
  for (int i = 0; i < kQuad; ++i) {
    const float error = quad.weight[i] - code_weight<kFormat>(quad_code<kFormat>(codes, i), step, tables);
    const float carried = eco_exp_avg(scalars, quad.exp_avg[i], quad.exp_avg_sq[i], error);
    quad.exp_avg[i] = i < count ? carried : 0.0f;
  }
}

// `value`: that of a Dynamic8Lookup.
USAF_HD void decode_moments_quad(const float (&value)[256], uint32_t codes, float absmax, float (&moment)[kQuad]) {
  for (int i = 0; i < kQuad; ++i) moment[i] = value[(codes >> 8 * i) & 0xffu] * absmax;
}

template <bool kSigned>
USAF_HD uint32_t encode_moments_quad(const Dynamic8Lookup<kSigned>& map, const float (&moment)[kQuad], float inverse) {
  uint32_t codes = 0;
  for (int i = 0; i < kQuad; ++i) codes |= dynamic8_encode(map, moment[i] * inverse) << 8 * i;
  return codes;
}

}  // namespace usaf

// Masked Adam of one whole NF4 block with AVX-512, from load to store in registers: the formulas of numerics/adam.h,
// residual.h, nf4.h and rng.h sixteen weights at a time, with the same bits as the plain loops of adam_block.h.
#pragma once
#include <cstdint>
#include <cstring>

#include "../kernel_api.h"
#include "../numerics/adam.h"
#include "../numerics/residual.h"
#include "../numerics/rng.h"
#include "adam_block.h"
#include "codec_avx512.h"

#ifdef USAF_HAS_ISA_LEVELS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header: the undefined source of a full mask
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace usaf::cpu {

#define USAF_AVX512_INLINE USAF_AVX512 inline __attribute__((always_inline))

inline constexpr int kVectors = 4;  // of 16 weights in a block

// Rounds `value` to the master's type, there and in place, and gathers the bits that differ.
USAF_AVX512_INLINE void store_master(float* master, __m512& value, __m512i& difference) {
  const __m512i old = _mm512_loadu_si512(master), bits = _mm512_castps_si512(value);
  difference = _mm512_or_si512(difference, _mm512_xor_si512(old, bits));
  _mm512_storeu_si512(master, bits);
}
USAF_AVX512_INLINE void store_master(Bf16* master, __m512& value, __m512i& difference) {
  auto* address = reinterpret_cast<__m256i*>(master);
  const __m512i words = _mm512_srli_epi32(avx512::round_to_bf16(value), 16);
  const __m256i stored = _mm512_cvtepi32_epi16(words);
  const __m256i changed = _mm256_xor_si256(_mm256_loadu_si256(address), stored);
  difference = _mm512_or_si512(difference, _mm512_zextsi256_si512(changed));
  _mm256_storeu_si256(address, stored);
  value = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

// adam_step; `denominator` is what it divided by.
template <class Grad>
USAF_AVX512_INLINE __m512 step16(const AdamScalars& s, float grad_scale, const Grad* grad_in, float* exp_avg,
                                 float* exp_avg_sq, __m512 weight, __m512& denominator) {
  const __m512 grad = _mm512_mul_ps(avx512::load(grad_in), _mm512_set1_ps(grad_scale));
  const __m512 m = _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(s.beta1), _mm512_loadu_ps(exp_avg)),
                                 _mm512_mul_ps(_mm512_set1_ps(s.one_minus_beta1), grad));
  const __m512 v = _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(s.beta2), _mm512_loadu_ps(exp_avg_sq)),
                                 _mm512_mul_ps(_mm512_set1_ps(s.one_minus_beta2), _mm512_mul_ps(grad, grad)));
  _mm512_storeu_ps(exp_avg, m);
  _mm512_storeu_ps(exp_avg_sq, v);
  denominator = _mm512_add_ps(_mm512_mul_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(s.inverse_sqrt_correction2)),
                              _mm512_set1_ps(s.eps));
  return _mm512_sub_ps(_mm512_mul_ps(weight, _mm512_set1_ps(s.keep)),
                       _mm512_div_ps(_mm512_mul_ps(_mm512_set1_ps(s.step_size), m), denominator));
}

// The table's entries of a block of 4-bit codes, the first of a pair in the high nibble.
USAF_AVX512_INLINE void look_up_codes(const uint8_t* codes, __m512 table, __m512 (&out)[kVectors]) {
  for (int i = 0; i < kVectors; ++i) {
    const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
    out[i] = _mm512_permutexvar_ps(index, table);
  }
}

USAF_AVX512_INLINE __m512 value_table(float step) {
  return _mm512_mul_ps(_mm512_loadu_ps(kNf4Values), _mm512_set1_ps(step));
}

// residual_unit of each code.
USAF_AVX512_INLINE __m512 unit_table(float step) {
  alignas(64) static constexpr float kGaps[16] = {
      nf4_gap(0), nf4_gap(1), nf4_gap(2),  nf4_gap(3),  nf4_gap(4),  nf4_gap(5),  nf4_gap(6),  nf4_gap(7),
      nf4_gap(8), nf4_gap(9), nf4_gap(10), nf4_gap(11), nf4_gap(12), nf4_gap(13), nf4_gap(14), nf4_gap(15)};
  const __m512 unit =
      _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(kGaps), _mm512_set1_ps(step)), _mm512_set1_ps(1.0f / kResidualLimit));
  return _mm512_max_ps(unit, _mm512_set1_ps(kMinResidualUnit));  // of a NaN the second, as in residual_unit
}

USAF_AVX512_INLINE __m512 load_residual(const int8_t* residual) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(residual));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

// residual_encode: the conversion rounds to nearest even, and max returns its second operand for a NaN.
USAF_AVX512_INLINE void store_residual(int8_t* residual, __m512 error, __m512 unit, __m512i& difference) {
  const __m512 limit = _mm512_set1_ps(kResidualLimit), units = _mm512_div_ps(error, unit);
  const __m512 clamped = _mm512_min_ps(_mm512_max_ps(units, _mm512_set1_ps(-kResidualLimit)), limit);
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(clamped));
  auto* address = reinterpret_cast<__m128i*>(residual);
  difference = _mm512_or_si512(difference, _mm512_zextsi128_si512(_mm_xor_si128(_mm_loadu_si128(address), bytes)));
  _mm_storeu_si128(address, bytes);
}

// One round of Philox on eight counters, a 32-bit word in the low half of each lane; the high halves are noise.
USAF_AVX512_INLINE void philox_round(__m512i (&c)[4], __m512i key0, __m512i key1) {
  const __m512i product0 = _mm512_mul_epu32(c[0], _mm512_set1_epi64(kPhiloxMultiplier0));
  const __m512i product1 = _mm512_mul_epu32(c[2], _mm512_set1_epi64(kPhiloxMultiplier1));
  c[0] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(product1, 32), c[1]), key0);
  c[2] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(product0, 32), c[3]), key1);
  c[1] = product1;
  c[3] = product0;
}

// The 32 numbers of eight counters that went through all rounds.
USAF_AVX512_INLINE void store_random(const __m512i (&c)[4], uint32_t* random) {
  const __m512i first = _mm512_mask_blend_epi32(0xaaaa, c[0], _mm512_slli_epi64(c[1], 32));
  const __m512i second = _mm512_mask_blend_epi32(0xaaaa, c[2], _mm512_slli_epi64(c[3], 32));
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(random, _mm512_permutex2var_epi64(first, low, second));
  _mm512_storeu_si512(random + 16, _mm512_permutex2var_epi64(first, high, second));
}

// random_group of sixteen groups: 64 numbers.
USAF_AVX512_INLINE void fill_groups(uint64_t seed, int32_t step, uint64_t group, uint32_t* random) {
  const __m512i low =
      _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(group)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  const __m512i high = _mm512_add_epi64(low, _mm512_set1_epi64(8));
  const __m512i steps = _mm512_set1_epi64(static_cast<uint32_t>(step)), zero = _mm512_setzero_si512();
  __m512i a[4] = {low, _mm512_srli_epi64(low, 32), steps, zero};
  __m512i b[4] = {high, _mm512_srli_epi64(high, 32), steps, zero};
  __m512i key0 = _mm512_set1_epi64(static_cast<int64_t>(seed)), key1 = _mm512_srli_epi64(key0, 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(a, key0, key1);
    philox_round(b, key0, key1);
    key0 = _mm512_add_epi32(key0, _mm512_set1_epi64(kPhiloxKey0));
    key1 = _mm512_add_epi32(key1, _mm512_set1_epi64(kPhiloxKey1));
  }
  store_random(a, random);
  store_random(b, random + 32);
}

// Random numbers of elements first .. first + 63.
USAF_AVX512 inline void fill_random_avx512(uint64_t seed, int32_t step, int64_t first, uint32_t* random) {
  const auto group = static_cast<uint64_t>(first / kRandomsPerGroup);
  const int64_t skip = first % kRandomsPerGroup;
  if (skip == 0) return fill_groups(seed, step, group, random);
  uint32_t numbers[kBlockSize + kRandomsPerGroup];
  fill_groups(seed, step, group, numbers);
  const Random4 last = random_group(seed, step, group + kBlockSize / kRandomsPerGroup);
  std::memcpy(numbers + kBlockSize, last.value, sizeof last.value);
  std::memcpy(random, numbers + skip, kBlockSize * sizeof *random);
}

// nf4_encode_stochastic of 16 normalised weights: the neighbour below is the nearest code or the one before it.
USAF_AVX512_INLINE __m512i encode_nf4_stochastic(__m512 normalized, const uint32_t* random) {
  const __m512 values = _mm512_loadu_ps(kNf4Values);
  const __m512i one = _mm512_set1_epi32(1), last = _mm512_set1_epi32(15);
  const __m512 x = _mm512_min_ps(_mm512_set1_ps(1.0f), normalized);  // of a NaN the second: it stays
  const __m512i nearest = avx512::encode<Format::nf4>(x);
  const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(nearest, values), _CMP_LT_OQ);
  const __m512i floor = _mm512_max_epi32(_mm512_mask_sub_epi32(nearest, above, nearest, one), _mm512_setzero_si512());
  const __m512 low = _mm512_permutexvar_ps(floor, values);
  const __m512 high = _mm512_permutexvar_ps(_mm512_min_epi32(_mm512_add_epi32(floor, one), last), values);
  const __m512 uniform = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_loadu_si512(random), 8)),
                                       _mm512_set1_ps(1.0f / 16777216.0f));  // to_uniform
  const __mmask16 up =
      _mm512_cmp_ps_mask(_mm512_sub_ps(x, low), _mm512_mul_ps(uniform, _mm512_sub_ps(high, low)), _CMP_GT_OQ);
  return _mm512_mask_add_epi32(floor, up, floor, one);
}

// The codes of a block, to nearest, or (random not null) stochastic; returns the stored scale.
template <Format kFormat>
USAF_AVX512_INLINE typename BlockCodec<kFormat>::Scale encode_nf4_block(const __m512 (&weight)[kVectors],
                                                                        const uint32_t* random, __m256i& codes) {
  // The bits of a magnitude order as integers do: a NaN above infinity above every number.
  __m512i largest = _mm512_setzero_si512();
  for (int i = 0; i < kVectors; ++i) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(weight[i]), _mm512_set1_epi32(0x7fffffff));
    largest = _mm512_max_epi32(largest, bits);
  }
  const float absmax = bits_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)));
  const auto scale = BlockCodec<kFormat>::make_scale(absmax);
  const __m512 inverse = _mm512_set1_ps(inverse_step(BlockCodec<kFormat>::step(scale)));
  __m512i code[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    const __m512 x = _mm512_mul_ps(weight[i], inverse);
    code[i] = random ? encode_nf4_stochastic(x, random + 16 * i) : avx512::encode<kFormat>(x);
  }
  codes = avx512::pack_nibbles(avx512::pack_bytes<kFormat>(code));
  return scale;
}

// Steps the 64 weights of a block. Gathers the bits of codes, absmax, master and residual that change in `difference`.
template <Format kFormat, AdamMode kMode, class Master, class Grad>
USAF_AVX512_INLINE void run_nf4_block(const AdamStep& step, const AdamBlock& block, __m512i& difference) {
  using Codec = BlockCodec<kFormat>;
  const auto* grad = static_cast<const Grad*>(block.grad);
  auto* master = static_cast<Master*>(block.master);
  auto& scale = *static_cast<typename Codec::Scale*>(block.absmax);
  __m512 weight[kVectors], denominator[kVectors];
  if constexpr (kMode == AdamMode::master) {
    for (int i = 0; i < kVectors; ++i) weight[i] = avx512::load(master + 16 * i);
  } else {
    look_up_codes(block.codes, value_table(Codec::step(scale)), weight);
  }
  if constexpr (kMode == AdamMode::residual) {
    __m512 unit[kVectors];
    look_up_codes(block.codes, unit_table(Codec::step(scale)), unit);
    for (int i = 0; i < kVectors; ++i) {
      weight[i] = _mm512_add_ps(weight[i], _mm512_mul_ps(load_residual(block.residual + 16 * i), unit[i]));
    }
  }

  for (int i = 0; i < kVectors; ++i) {
    weight[i] = step16(step.scalars, step.grad_scale, grad + 16 * i, block.exp_avg + 16 * i, block.exp_avg_sq + 16 * i,
                       weight[i], denominator[i]);
    if constexpr (kMode == AdamMode::master) store_master(master + 16 * i, weight[i], difference);
  }

  const __m256i old_codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block.codes));
  const float old_step = Codec::step(scale);
  __m256i codes;
  alignas(64) uint32_t random[kBlockSize];
  bool stochastic = false;
  if constexpr (kMode == AdamMode::in_place || kMode == AdamMode::eco) stochastic = step.args.stochastic;
  if (stochastic) {
    fill_random_avx512(step.args.seed, step.step, block.first_element, random);
    scale = encode_nf4_block<kFormat>(weight, random, codes);
  } else {
    scale = encode_nf4_block<kFormat>(weight, nullptr, codes);
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(block.codes), codes);
  const uint32_t scale_changed = float_bits(old_step) ^ float_bits(Codec::step(scale));
  difference = _mm512_or_si512(difference, _mm512_zextsi256_si512(_mm256_xor_si256(old_codes, codes)));
  difference =
      _mm512_or_si512(difference, _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int32_t>(scale_changed))));

  if constexpr (kMode == AdamMode::residual || kMode == AdamMode::eco) {
    __m512 decoded[kVectors], unit[kVectors];
    look_up_codes(block.codes, value_table(Codec::step(scale)), decoded);
    if constexpr (kMode == AdamMode::residual) look_up_codes(block.codes, unit_table(Codec::step(scale)), unit);
    for (int i = 0; i < kVectors; ++i) {
      const __m512 error = _mm512_sub_ps(weight[i], decoded[i]);
      if constexpr (kMode == AdamMode::residual) {
        store_residual(block.residual + 16 * i, error, unit[i], difference);
      } else {  // eco_exp_avg
        const __m512 carried = _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(step.scalars.eco), error), denominator[i]);
        float* exp_avg = block.exp_avg + 16 * i;
        _mm512_storeu_ps(exp_avg, _mm512_add_ps(_mm512_loadu_ps(exp_avg), carried));
      }
    }
  }
}

}  // namespace usaf::cpu
#pragma GCC diagnostic pop
#endif

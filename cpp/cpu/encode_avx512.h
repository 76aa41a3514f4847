// NF4 encode of a whole block with AVX-512: a 32-bin lookup finds the codes of 16 weights at a time. The same bits as
// nf4_encode and nf4_encode_stochastic (numerics/nf4.h), which every other CPU takes.
#pragma once
#include <cstdint>

#include "../numerics/block_codec.h"
#include "isa.h"

#ifdef USAF_HAS_ISA_LEVELS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header: the undefined source of a full mask
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

namespace usaf::cpu {

// Each sixteenth of [-1, 1] holds at most one bound between codes: the code is the number of bounds below the bin, and
// one more beyond the bin's own bound.
struct Nf4Bins {
  float bound[32];
  int32_t code[32];
};

constexpr Nf4Bins make_nf4_bins() {
  Nf4Bins bins{};
  int passed = 0;
  for (int bin = 0; bin < 32; ++bin) {
    const float end = static_cast<float>(bin - 15) / 16.0f;
    bins.code[bin] = passed;
    const bool holds_bound = passed < 15 && nf4_threshold(passed) < end;
    bins.bound[bin] = holds_bound ? nf4_threshold(passed++) : 2.0f;
    if (passed < 15 && nf4_threshold(passed) < end) bins.code[bin] = -1;
  }
  return bins;
}

inline constexpr Nf4Bins kNf4Bins = make_nf4_bins();
constexpr bool nf4_bins_hold_one_bound() {
  for (const int32_t code : kNf4Bins.code) {
    if (code < 0) return false;
  }
  return kNf4Bins.code[31] == 14 || kNf4Bins.code[31] == 15;
}
static_assert(nf4_bins_hold_one_bound());

// The same for the table's values, of which each sixteenth of [-1, 1] holds at most one too: the last value that is not
// above a weight.
constexpr Nf4Bins make_nf4_floor_bins() {
  Nf4Bins bins{};
  int passed = 0;
  for (int bin = 0; bin < 32; ++bin) {
    const float end = static_cast<float>(bin - 15) / 16.0f;
    const bool holds_value = passed < 16 && (nf4_value(passed) < end || bin == 31);
    bins.code[bin] = passed - 1;
    bins.bound[bin] = holds_value ? nf4_value(passed++) : 2.0f;
    if (passed < 16 && nf4_value(passed) < end) bins.code[bin] = -2;
  }
  return bins;
}

inline constexpr Nf4Bins kNf4FloorBins = make_nf4_floor_bins();
constexpr bool nf4_bins_hold_one_value() {
  for (const int32_t code : kNf4FloorBins.code) {
    if (code < -1) return false;
  }
  return kNf4FloorBins.code[31] == 14 && kNf4FloorBins.bound[31] == 1.0f;
}
static_assert(nf4_bins_hold_one_value());

#define USAF_AVX512_INLINE USAF_AVX512 inline __attribute__((always_inline))

// The block's absmax. The bits of a magnitude order as integers do: a NaN above infinity above every number.
USAF_AVX512_INLINE float block_absmax(const __m512 (&weight)[4]) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i magnitude[4];
  for (int i = 0; i < 4; ++i) magnitude[i] = _mm512_and_si512(_mm512_castps_si512(weight[i]), mask);
  const __m512i largest =
      _mm512_max_epi32(_mm512_max_epi32(magnitude[0], magnitude[1]), _mm512_max_epi32(magnitude[2], magnitude[3]));
  return bits_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)));
}

// The sixteenth of [-1, 1] that a normalised weight is in. Rounding may move one next to a bin's end into the next bin,
// where nothing but a bound at its very start changes the code, and that one is compared with.
USAF_AVX512_INLINE __m512i nf4_bin(__m512 x) {
  const __m512 sixteen = _mm512_set1_ps(16.0f);
  return _mm512_min_epi32(_mm512_cvttps_epi32(_mm512_fmadd_ps(x, sixteen, sixteen)), _mm512_set1_epi32(31));
}

// The 32 bytes of a block's codes.
USAF_AVX512_INLINE __m256i pack_nf4(const __m512i (&code)[4]) {
  // Packing works within 128-bit lanes and leaves groups of four codes of each register in turn: put them in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i packed =
      _mm512_packus_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3]));
  const __m512i bytes = _mm512_permutexvar_epi32(order, packed);
  const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110));  // the first of a pair times 16
  return _mm512_cvtepi16_epi8(pairs);
}

// Codes of the 64 weights of a block; returns the stored scale.
template <Format kFormat>
USAF_AVX512_INLINE typename BlockCodec<kFormat>::Scale encode_nf4_block(const __m512 (&weight)[4], __m256i& codes) {
  const auto scale = BlockCodec<kFormat>::make_scale(block_absmax(weight));
  const __m512 inverse = _mm512_set1_ps(inverse_step(BlockCodec<kFormat>::step(scale)));
  const __m512 bound_low = _mm512_loadu_ps(kNf4Bins.bound), bound_high = _mm512_loadu_ps(kNf4Bins.bound + 16);
  const __m512i code_low = _mm512_loadu_si512(kNf4Bins.code), code_high = _mm512_loadu_si512(kNf4Bins.code + 16);
  __m512i code[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 x = _mm512_mul_ps(weight[i], inverse);
    const __m512i bin = nf4_bin(x);
    const __mmask16 beyond = _mm512_cmp_ps_mask(x, _mm512_permutex2var_ps(bound_low, bin, bound_high), _CMP_GT_OQ);
    const __m512i passed = _mm512_permutex2var_epi32(code_low, bin, code_high);
    code[i] = _mm512_mask_add_epi32(passed, beyond, passed, _mm512_set1_epi32(1));
  }
  codes = pack_nf4(code);
  return scale;
}

// nf4_encode_stochastic with one random number a weight.
template <Format kFormat>
USAF_AVX512_INLINE typename BlockCodec<kFormat>::Scale encode_nf4_block_stochastic(const __m512 (&weight)[4],
                                                                                   const uint32_t* random,
                                                                                   __m256i& codes) {
  const auto scale = BlockCodec<kFormat>::make_scale(block_absmax(weight));
  const __m512 inverse = _mm512_set1_ps(inverse_step(BlockCodec<kFormat>::step(scale)));
  const __m512 bound_low = _mm512_loadu_ps(kNf4FloorBins.bound), bound_high = _mm512_loadu_ps(kNf4FloorBins.bound + 16);
  const __m512i code_low = _mm512_loadu_si512(kNf4FloorBins.code);
  const __m512i code_high = _mm512_loadu_si512(kNf4FloorBins.code + 16);
  const __m512 values = _mm512_loadu_ps(kNf4Values);
  const __m512i one = _mm512_set1_epi32(1), last = _mm512_set1_epi32(15);
  __m512i code[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 x = _mm512_min_ps(_mm512_set1_ps(1.0f), _mm512_mul_ps(weight[i], inverse));  // a NaN stays
    const __m512i bin = nf4_bin(x);
    const __mmask16 reached = _mm512_cmp_ps_mask(x, _mm512_permutex2var_ps(bound_low, bin, bound_high), _CMP_GE_OQ);
    const __m512i passed = _mm512_permutex2var_epi32(code_low, bin, code_high);
    const __m512i floor = _mm512_max_epi32(_mm512_mask_add_epi32(passed, reached, passed, one), _mm512_setzero_si512());
    const __m512 low = _mm512_permutexvar_ps(floor, values);
    const __m512 high = _mm512_permutexvar_ps(_mm512_min_epi32(_mm512_add_epi32(floor, one), last), values);
    const __m512 uniform = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_loadu_si512(random + 16 * i), 8)),
                                         _mm512_set1_ps(1.0f / 16777216.0f));  // to_uniform
    const __mmask16 up =
        _mm512_cmp_ps_mask(_mm512_sub_ps(x, low), _mm512_mul_ps(uniform, _mm512_sub_ps(high, low)), _CMP_GT_OQ);
    code[i] = _mm512_mask_add_epi32(floor, up, floor, one);
  }
  codes = pack_nf4(code);
  return scale;
}

}  // namespace usaf::cpu
#pragma GCC diagnostic pop
#endif

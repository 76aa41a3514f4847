// NF4 encode of a whole block with AVX-512: a 32-bin lookup finds the code of 16 weights at a time. The same bits as
// nf4_encode (numerics/nf4.h), which every other CPU takes. Included by kernels that have the block in registers.
#pragma once
#include <cstdint>

#include "../numerics/block_codec.h"
#include "isa.h"

#ifdef USAF_HAS_ISA_LEVELS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header: the undefined source of a full mask
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

// weight: the 64 weights of a block. codes: 32 bytes. Returns the stored scale.
template <Format kFormat>
USAF_AVX512 inline __attribute__((always_inline)) typename BlockCodec<kFormat>::Scale encode_nf4_block(
    const __m512 (&weight)[4], uint8_t* codes) {
  // The bits of a magnitude order as integers do: a NaN above infinity above every number.
  const __m512i magnitude_mask = _mm512_set1_epi32(0x7fffffff);
  __m512i magnitude[4];
  for (int i = 0; i < 4; ++i) magnitude[i] = _mm512_and_si512(_mm512_castps_si512(weight[i]), magnitude_mask);
  const __m512i largest =
      _mm512_max_epi32(_mm512_max_epi32(magnitude[0], magnitude[1]), _mm512_max_epi32(magnitude[2], magnitude[3]));
  const float absmax = bits_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)));
  const auto scale = BlockCodec<kFormat>::make_scale(absmax);
  const __m512 inverse = _mm512_set1_ps(inverse_step(BlockCodec<kFormat>::step(scale)));

  const __m512 bound_low = _mm512_loadu_ps(kNf4Bins.bound), bound_high = _mm512_loadu_ps(kNf4Bins.bound + 16);
  const __m512i code_low = _mm512_loadu_si512(kNf4Bins.code), code_high = _mm512_loadu_si512(kNf4Bins.code + 16);
  const __m512 sixteen = _mm512_set1_ps(16.0f);
  const __m512i last_bin = _mm512_set1_epi32(31), one = _mm512_set1_epi32(1);
  __m512i code[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 x = _mm512_mul_ps(weight[i], inverse);
    // Rounding may move a weight next to a bin's end into the next bin, which gives the same code: no bound is there.
    const __m512i bin = _mm512_min_epi32(_mm512_cvttps_epi32(_mm512_fmadd_ps(x, sixteen, sixteen)), last_bin);
    const __mmask16 beyond = _mm512_cmp_ps_mask(x, _mm512_permutex2var_ps(bound_low, bin, bound_high), _CMP_GT_OQ);
    const __m512i passed = _mm512_permutex2var_epi32(code_low, bin, code_high);
    code[i] = _mm512_mask_add_epi32(passed, beyond, passed, one);
  }
  // Packing works within 128-bit lanes and leaves groups of four codes of each register in turn: put them in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i packed =
      _mm512_packus_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3]));
  const __m512i bytes = _mm512_permutexvar_epi32(order, packed);
  const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110));  // the first of a pair times 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_cvtepi16_epi8(pairs));
  return scale;
}

// The same from memory.
template <Format kFormat>
USAF_AVX512 inline __attribute__((always_inline)) typename BlockCodec<kFormat>::Scale encode_nf4_block(
    const float* weight, uint8_t* codes) {
  const __m512 values[4] = {_mm512_loadu_ps(weight), _mm512_loadu_ps(weight + 16), _mm512_loadu_ps(weight + 32),
                            _mm512_loadu_ps(weight + 48)};
  return encode_nf4_block<kFormat>(values, codes);
}

}  // namespace usaf::cpu
#pragma GCC diagnostic pop
#endif

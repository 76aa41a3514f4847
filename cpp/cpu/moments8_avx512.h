// Block-wise 8-bit moments with AVX-512: whole multiples of 32 moments of a block. The same bits as the plain loops.
#pragma once
#include <bit>
#include <cstdint>

#include "../numerics/dynamic8.h"
#include "isa.h"

#ifdef USAF_HAS_ISA_LEVELS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header: the undefined source of a full mask
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

namespace usaf::cpu {

// The map's values cut in halves, for lookups of 16 bits.
struct Dynamic8Halves {
  alignas(64) uint16_t low[256];
  alignas(64) uint16_t high[256];
};

constexpr Dynamic8Halves make_dynamic8_halves(const Dynamic8& map) {
  Dynamic8Halves halves{};
  for (int i = 0; i < 256; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(map.value[i]);
    halves.low[i] = static_cast<uint16_t>(bits);
    halves.high[i] = static_cast<uint16_t>(bits >> 16);
  }
  return halves;
}

// Encoding by arithmetic. The bounds that a magnitude may pass fall into nine regions: below the first one; the seven
// decades, within which they are equally far apart; above the last one. In a region the number of bounds passed is
// a * scale + offset, rounded down, at most `last`. That is exact but next to a bound, where the plain search decides.
struct Dynamic8Regions {
  alignas(64) float scale[16], offset[16];
  alignas(64) int32_t last[16];
  // By the low 5 bits of a magnitude's exponent, 2^-31 to 1: the region of its smallest numbers, and the bound above
  // which the next region begins.
  alignas(64) int32_t first_region[32];
  alignas(64) float next_region[32];
};

inline constexpr float kNextToBound = 1.0f / 4096.0f;  // of the bounds' distance

constexpr Dynamic8Regions make_dynamic8_regions(const Dynamic8& map, bool is_signed) {
  constexpr double kDecades[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  const int zero = is_signed ? 127 : 0;
  Dynamic8Regions regions{};
  float start[9] = {0.0f};  // a region holds what is above its start
  int passed = 1;
  regions.offset[0] = 0.5f;
  for (int i = 0; i < 7; ++i) {
    const int parts = is_signed ? 1 << i : 2 << i;
    start[i + 1] = map.bound[zero + passed - 1];
    regions.scale[i + 1] = static_cast<float>(parts / (0.9 * kDecades[i]));
    regions.offset[i + 1] = static_cast<float>(passed - 0.1 / 0.9 * parts);
    passed += parts;
    regions.last[i + 1] = passed - 1;
  }
  start[8] = map.bound[zero + passed - 1];
  regions.offset[8] = static_cast<float>(passed) + 0.5f;
  regions.last[8] = passed;
  float magnitude = 1.0f / 2147483648.0f;
  for (int octave = 0; octave < 32; ++octave, magnitude *= 2.0f) {
    int region = 0;
    while (region < 8 && start[region + 1] < magnitude) ++region;
    regions.first_region[octave] = region;
    const bool next = region < 8 && start[region + 1] < 2.0f * magnitude;
    regions.next_region[octave] = next ? start[region + 1] : 4.0f;
  }
  return regions;
}

// Whether every bound within a decade is where the arithmetic has it, to a fourth of the margin.
constexpr bool dynamic8_regions_fit(const Dynamic8& map, const Dynamic8Regions& regions, bool is_signed) {
  const int zero = is_signed ? 127 : 0;
  for (int region = 1, bound = 1; region < 8; ++region, ++bound) {  // from one decade to the next: compared with
    for (; bound < regions.last[region]; ++bound) {
      const float place = map.bound[zero + bound] * regions.scale[region] + regions.offset[region];
      const float error = place - static_cast<float>(bound + 1);
      if (error > kNextToBound / 4 || error < -kNextToBound / 4) return false;
    }
  }
  return true;
}

struct Dynamic8Vectors {
  const Dynamic8& map;
  Dynamic8Halves halves;
  Dynamic8Regions regions;
  bool is_signed;
};

inline constexpr Dynamic8Vectors kSignedVectors{kDynamic8Signed, make_dynamic8_halves(kDynamic8Signed),
                                                make_dynamic8_regions(kDynamic8Signed, true), true};
inline constexpr Dynamic8Vectors kUnsignedVectors{kDynamic8Unsigned, make_dynamic8_halves(kDynamic8Unsigned),
                                                  make_dynamic8_regions(kDynamic8Unsigned, false), false};
static_assert(dynamic8_regions_fit(kDynamic8Signed, kSignedVectors.regions, true));
static_assert(dynamic8_regions_fit(kDynamic8Unsigned, kUnsignedVectors.regions, false));

// Entries of a 256-entry table for 32 indices.
USAF_AVX512 inline __attribute__((always_inline)) __m512i look_up_256(const __m512i (&table)[8], __m512i index,
                                                                      __mmask32 bit6, __mmask32 bit7) {
  const __m512i part0 = _mm512_permutex2var_epi16(table[0], index, table[1]);
  const __m512i part1 = _mm512_permutex2var_epi16(table[2], index, table[3]);
  const __m512i part2 = _mm512_permutex2var_epi16(table[4], index, table[5]);
  const __m512i part3 = _mm512_permutex2var_epi16(table[6], index, table[7]);
  return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, part0, part1),
                                 _mm512_mask_blend_epi16(bit6, part2, part3));
}

// count: a multiple of 32.
USAF_AVX512 inline void decode_moments_avx512(const Dynamic8Vectors& vectors, const uint8_t* codes, float absmax,
                                              int64_t count, float* out) {
  __m512i low[8], high[8];
  for (int i = 0; i < 8; ++i) {
    low[i] = _mm512_load_si512(vectors.halves.low + 32 * i);
    high[i] = _mm512_load_si512(vectors.halves.high + 32 * i);
  }
  const __m512 scale = _mm512_set1_ps(absmax);
  for (int64_t i = 0; i < count; i += 32) {
    // Interleaving the halves works within 128-bit lanes: the codes are put where it leaves them in order.
    const __m512i loaded = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
    const __m512i index = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), loaded);
    const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
    const __m512i low_half = look_up_256(low, index, bit6, bit7), high_half = look_up_256(high, index, bit6, bit7);
    const __m512 first = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low_half, high_half));
    const __m512 second = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low_half, high_half));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(first, scale));
    _mm512_storeu_ps(out + i + 16, _mm512_mul_ps(second, scale));
  }
}

// The moments' largest magnitude, as ordered bits.
USAF_AVX512 inline uint32_t largest_moment_avx512(const float* moments, int64_t count) {
  __m512i largest = _mm512_setzero_si512();
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < count; i += 16) {
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_loadu_si512(moments + i), mask));
  }
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(largest));
}

// count: a multiple of 16.
USAF_AVX512 inline void encode_moments_avx512(const Dynamic8Vectors& vectors, const float* moments, float inverse,
                                              int64_t count, uint8_t* codes) {
  const Dynamic8Regions& regions = vectors.regions;
  const __m512 region_scale = _mm512_load_ps(regions.scale), region_offset = _mm512_load_ps(regions.offset);
  const __m512i region_last = _mm512_load_si512(regions.last);
  const __m512i first_low = _mm512_load_si512(regions.first_region);
  const __m512i first_high = _mm512_load_si512(regions.first_region + 16);
  const __m512 next_low = _mm512_load_ps(regions.next_region), next_high = _mm512_load_ps(regions.next_region + 16);
  const __m512 smallest = _mm512_set1_ps(1.0f / 2147483648.0f), margin = _mm512_set1_ps(kNextToBound);
  const __m512i one = _mm512_set1_epi32(1), zero_code = _mm512_set1_epi32(127);
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(moments + i), _mm512_set1_ps(inverse));
    // max gives its second operand for a NaN: it stays one, and the margin below catches it.
    const __m512 a = _mm512_max_ps(smallest, vectors.is_signed ? _mm512_abs_ps(x) : x);
    const __m512i octave = _mm512_srli_epi32(_mm512_castps_si512(a), 23);
    const __m512 next = _mm512_permutex2var_ps(next_low, octave, next_high);
    const __m512i first = _mm512_permutex2var_epi32(first_low, octave, first_high);
    const __m512i region = _mm512_mask_add_epi32(first, _mm512_cmp_ps_mask(a, next, _CMP_GT_OQ), first, one);
    const __m512 place = _mm512_add_ps(_mm512_mul_ps(a, _mm512_permutexvar_ps(region, region_scale)),
                                       _mm512_permutexvar_ps(region, region_offset));
    const __m512 distance = _mm512_abs_ps(_mm512_sub_ps(place, _mm512_roundscale_ps(place, _MM_FROUND_TO_NEAREST_INT)));
    const __mmask16 unsure =
        _mm512_cmp_ps_mask(distance, margin, _CMP_NGE_UQ) | _mm512_cmp_ps_mask(a, next, _CMP_EQ_OQ);
    __m512i code = _mm512_min_epi32(_mm512_cvttps_epi32(place), _mm512_permutexvar_epi32(region, region_last));
    if (vectors.is_signed) {
      const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
      const __m512i up = _mm512_add_epi32(zero_code, code);
      code = _mm512_mask_sub_epi32(up, negative, zero_code, _mm512_min_epi32(code, zero_code));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code));
    for (uint32_t left = unsure; left != 0; left &= left - 1) {
      const int lane = std::countr_zero(left);
      codes[i + lane] = static_cast<uint8_t>(dynamic8_encode(vectors.map, moments[i + lane] * inverse));
    }
  }
}

}  // namespace usaf::cpu
#pragma GCC diagnostic pop
#endif

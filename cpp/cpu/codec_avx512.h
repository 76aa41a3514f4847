// The codec's whole blocks with AVX-512BW, by hand; the bits are those of codec_generic.h.
//
// nf4 decode: a block's 16 values become one register, a permute looks up 32 (16-bit types) or 16 (fp32) weights. nf4
// encode: the lookup of numerics/nf4.h. int8 and fp8: their formulas, 16 weights at a time; an e4m3fn number with its
// bits moved is a binary16 one 2^8 times smaller.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../numerics/bfloat16.h"
#include "../numerics/block_codec.h"
#include "isa.h"

#ifdef USAF_HAS_ISA_LEVELS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header: the undefined source of a full mask
#include <immintrin.h>

namespace usaf::cpu::avx512 {

// Weights come from DRAM once: ask for them this far ahead.
inline constexpr int64_t kPrefetchBytes = 2048;
inline constexpr int64_t kEncodePrefetchBytes = 4096;

// Picks the high halves of two registers' doublewords.
struct OddWords {
  uint16_t word[32];
};
constexpr OddWords make_odd_words() {
  OddWords odd{};
  for (int i = 0; i < 32; ++i) odd.word[i] = static_cast<uint16_t>(2 * i + 1);
  return odd;
}
inline constexpr OddWords kOddWords = make_odd_words();

USAF_AVX512 inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }
USAF_AVX512 inline __m512 load(const Bf16* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
USAF_AVX512 inline __m512 load(const F16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// to_bf16 of numerics/bfloat16.h, in the high halves, unless it is a NaN whose low half is not zero.
USAF_AVX512 inline __m512i round_number_to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
// to_bf16 of numerics/bfloat16.h, in the high halves.
USAF_AVX512 inline __m512i round_to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value), nearest = round_number_to_bf16(value);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(nearest, is_nan, bits, _mm512_set1_epi32(0x400000));
}
USAF_AVX512 inline __m256i to_16_bits(__m512 value, Bf16) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(value), 16));
}
USAF_AVX512 inline __m256i to_16_bits(__m512 value, F16) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
USAF_AVX512 inline __m512i odd_words(__m512i low, __m512i high) {
  return _mm512_permutex2var_epi16(low, _mm512_loadu_si512(kOddWords.word), high);
}
USAF_AVX512 inline __m512i to_16_bits(__m512 low, __m512 high, Bf16) {
  return odd_words(round_to_bf16(low), round_to_bf16(high));
}
USAF_AVX512 inline __m512i to_16_bits(__m512 low, __m512 high, F16) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(to_16_bits(low, F16{})), to_16_bits(high, F16{}), 1);
}

// kStream: past the caches; `to` is then aligned to the store.
template <bool kStream>
USAF_AVX512 inline void store_bytes(void* to, __m512i value) {
  if constexpr (kStream) {
    _mm512_stream_si512(static_cast<__m512i*>(to), value);
  } else {
    _mm512_storeu_si512(to, value);
  }
}
template <bool kStream>
USAF_AVX512 inline void store_half(void* to, __m256i value) {
  if constexpr (kStream) {
    _mm256_stream_si256(static_cast<__m256i*>(to), value);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(to), value);
  }
}
// 32 weights.
template <bool kStream>
USAF_AVX512 inline void store(float* to, __m512 low, __m512 high) {
  store_bytes<kStream>(to, _mm512_castps_si512(low));
  store_bytes<kStream>(to + 16, _mm512_castps_si512(high));
}
template <bool kStream, class T>
USAF_AVX512 inline void store(T* to, __m512 low, __m512 high) {
  store_bytes<kStream>(to, to_16_bits(low, high, T{}));
}

template <bool kStream>
USAF_AVX512 inline void decode_nf4_block(const uint8_t* codes, __m512 table, float* out) {
  for (int64_t i = 0; i < kBlockSize; i += 16) {
    // 8 bytes in 8 quadwords; the permute reads the low 4 bits of each doubleword: high nibble first.
    const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
    store_bytes<kStream>(out + i, _mm512_castps_si512(_mm512_permutexvar_ps(index, table)));
  }
}
template <bool kStream, class T>
USAF_AVX512 inline void decode_nf4_block(const uint8_t* codes, __m512 table, T* out) {
  const __m512i twice = _mm512_broadcast_i64x4(to_16_bits(table, T{}));  // so that bit 4 of an index does not matter
  for (int64_t i = 0; i < kBlockSize; i += 32) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    store_bytes<kStream>(out + i, _mm512_permutexvar_epi16(index, twice));
  }
}

// The values of 32 codes. Those of fp8 are 2^8 times smaller.
struct Values {
  __m512 low, high;
};
USAF_AVX512 inline Values int8_values(__m256i codes) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes))),
          _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)))};
}
USAF_AVX512 inline Values fp8_values(__m256i codes) {
  const __m512i wide = _mm512_cvtepi8_epi16(codes), magnitude = _mm512_set1_epi16(0x7f);
  const __m512i number = _mm512_andnot_si512(_mm512_set1_epi16(0x4000), _mm512_slli_epi16(wide, 7));
  const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(wide, magnitude), magnitude);
  const __m512i half = _mm512_mask_add_epi16(number, is_nan, number, _mm512_set1_epi16(0x7e00 - 0x3f80));
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(half)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1))};
}

// A factor whose products with the codes' values round_number_to_bf16 may take: a NaN loses its low half, as it would.
USAF_AVX512 inline __m512 without_low_nan(__m512 factor) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(factor, factor, _CMP_UNORD_Q);
  const __m512i bits = _mm512_castps_si512(factor);
  const __m512i quiet =
      _mm512_or_si512(_mm512_and_si512(bits, _mm512_set1_epi32(~0xffff)), _mm512_set1_epi32(0x400000));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, is_nan, quiet));
}

template <Format kFormat, bool kStream, class T>
USAF_AVX512 inline void decode_blocks(const uint8_t* codes, const typename BlockCodec<kFormat>::Scale* scales,
                                      int64_t num_blocks, T* out) {
  constexpr int64_t kBytes = used_bytes(kFormat, kBlockSize);
  for (int64_t block = 0; block < num_blocks; ++block, codes += kBytes, out += kBlockSize) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetchBytes), _MM_HINT_T0);
    const float step = BlockCodec<kFormat>::step(scales[block]);
    if constexpr (is_nf4(kFormat)) {
      const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(kNf4Values), _mm512_set1_ps(step));
      decode_nf4_block<kStream>(codes, table, out);
    } else {
      __m512 factor = _mm512_set1_ps(kFormat == Format::fp8 ? step * 256.0f : step);  // exact
      if constexpr (std::is_same_v<T, Bf16>) factor = without_low_nan(factor);
      for (int64_t i = 0; i < kBlockSize; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        const Values value = kFormat == Format::fp8 ? fp8_values(bytes) : int8_values(bytes);
        const __m512 low = _mm512_mul_ps(value.low, factor), high = _mm512_mul_ps(value.high, factor);
        if constexpr (std::is_same_v<T, Bf16>) {
          store_bytes<kStream>(out + i, odd_words(round_number_to_bf16(low), round_number_to_bf16(high)));
        } else {
          store<kStream>(out + i, low, high);
        }
      }
    }
  }
}

// 16 codes, one in each doubleword. The same operations as in numerics/nf4.h, int8.h and fp8.h.
template <Format kFormat>
USAF_AVX512 inline __m512i encode(__m512 normalized) {
  if constexpr (is_nf4(kFormat)) {
    const __m512 bounded = _mm512_min_ps(normalized, _mm512_set1_ps(kNf4LookupMax));
    const __m512i bin = _mm512_castps_si512(_mm512_add_ps(bounded, _mm512_set1_ps(kNf4LookupShift)));
    const __m512 bound =
        _mm512_permutex2var_ps(_mm512_loadu_ps(kNf4Lookup32.bound), bin, _mm512_loadu_ps(kNf4Lookup32.bound + 16));
    const __m512i base = _mm512_permutex2var_epi32(_mm512_loadu_si512(kNf4Lookup32.base), bin,
                                                   _mm512_loadu_si512(kNf4Lookup32.base + 16));
    const __mmask16 above = _mm512_cmp_ps_mask(normalized, bound, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1));
  } else if constexpr (kFormat == Format::int8) {
    const __m512 above = _mm512_max_ps(normalized, _mm512_set1_ps(-kInt8Max));
    return _mm512_cvt_roundps_epi32(_mm512_min_ps(above, _mm512_set1_ps(kInt8Max)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i all = _mm512_castps_si512(normalized);
    const __m512 magnitude = _mm512_min_ps(_mm512_abs_ps(normalized), _mm512_set1_ps(kFp8Max));
    const __m512i bits = _mm512_castps_si512(magnitude), odd = _mm512_set1_epi32(1);
    const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7ffff));
    const __m512i even = _mm512_add_epi32(half, _mm512_and_si512(_mm512_srli_epi32(bits, 20), odd));
    const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(even, 20), _mm512_set1_epi32(kFp8Rebias));
    const __m512 rounder = _mm512_set1_ps(kFp8SubnormalRounder);
    const __m512i subnormal =
        _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(magnitude, rounder)), _mm512_castps_si512(rounder));
    const __mmask16 small = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(kFp8SmallestNormal), _CMP_LT_OQ);
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(all, 24), _mm512_set1_epi32(0x80));
    return _mm512_or_si512(_mm512_mask_mov_epi32(normal, small, subnormal), sign);
  }
}

// 64 codes of doublewords to bytes, in order.
template <Format kFormat>
USAF_AVX512 inline __m512i pack_bytes(const __m512i (&code)[4]) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i bytes;
  if constexpr (kFormat == Format::int8) {
    bytes = _mm512_packs_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3]));
  } else {
    bytes = _mm512_packus_epi16(_mm512_packus_epi32(code[0], code[1]), _mm512_packus_epi32(code[2], code[3]));
  }
  return _mm512_permutexvar_epi32(order, bytes);
}

// 64 nf4 codes of bytes to nibbles.
USAF_AVX512 inline __m256i pack_nibbles(__m512i bytes) {
  const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110));  // 16 * first + second
  return _mm512_cvtepi16_epi8(pairs);
}

// |w|'s largest bits in a block.
template <class T>
USAF_AVX512 inline uint32_t block_magnitude(const T* weight) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_and_si512(_mm512_castps_si512(load(weight)), magnitude);
  for (size_t i = 0; i < kBlockSize * sizeof(T); i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(weight) + kEncodePrefetchBytes + i, _MM_HINT_T0);
  }
  for (int i = 1; i < 4; ++i) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(load(weight + 16 * i)), magnitude);
    largest = _mm512_max_epu32(largest, bits);
  }
  return _mm512_reduce_max_epu32(largest);
}

// Stores the scales of up to 16 blocks and returns their steps: make_scale and step of numerics/block_codec.h.
template <Format kFormat>
USAF_AVX512 inline __m512 store_scales(__m512 absmax, __mmask16 blocks, typename BlockCodec<kFormat>::Scale* scales) {
  if constexpr (kFormat == Format::nf4_f16) {
    const __m256i up = _mm512_cvtps_ph(absmax, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(scales, blocks, up);
    return _mm512_cvtph_ps(up);
  } else {
    const __m512 scale = kFormat == Format::fp8 ? _mm512_div_ps(absmax, _mm512_set1_ps(kFp8Max)) : absmax;
    _mm512_mask_storeu_ps(scales, blocks, scale);
    return kFormat == Format::int8 ? _mm512_div_ps(absmax, _mm512_set1_ps(kInt8Max)) : scale;
  }
}

template <Format kFormat, bool kStream, class T>
USAF_AVX512 inline void encode_block(const T* weight, float inverse, uint8_t* codes) {
  __m512i code[4];
  for (int i = 0; i < 4; ++i) {
    code[i] = encode<kFormat>(_mm512_mul_ps(load(weight + 16 * i), _mm512_set1_ps(inverse)));
  }
  const __m512i bytes = pack_bytes<kFormat>(code);
  if constexpr (is_nf4(kFormat)) {
    store_half<kStream>(codes, pack_nibbles(bytes));
  } else {
    store_bytes<kStream>(codes, bytes);
  }
}

// 16 blocks at a time: all their scales at once, while the weights stay in the first-level cache.
template <Format kFormat, bool kStream, class T>
USAF_AVX512 inline void encode_blocks(const T* weight, int64_t num_blocks, uint8_t* codes,
                                      typename BlockCodec<kFormat>::Scale* scales) {
  for (int64_t first = 0; first < num_blocks; first += 16) {
    const int64_t count = num_blocks - first < 16 ? num_blocks - first : 16;
    alignas(64) uint32_t absmax[16] = {};
    alignas(64) float inverse[16];
    for (int64_t b = 0; b < count; ++b) absmax[b] = block_magnitude(weight + (first + b) * kBlockSize);
    const auto blocks = static_cast<__mmask16>((1u << count) - 1u);
    const __m512 step = store_scales<kFormat>(_mm512_load_ps(absmax), blocks, scales + first);
    const __m512 bounded = _mm512_max_ps(step, _mm512_set1_ps(kMinStep));
    _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1.0f), bounded));
    for (int64_t b = 0; b < count; ++b) {
      encode_block<kFormat, kStream>(weight + (first + b) * kBlockSize, inverse[b],
                                     codes + (first + b) * used_bytes(kFormat, kBlockSize));
    }
  }
}

// Groups of 32 weights of `count`, from one type to another; returns how many weights were done.
template <bool kStream, class From, class To>
USAF_AVX512 inline int64_t convert_groups(const From* from, int64_t count, To* to) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) store<kStream>(to + i, load(from + i), load(from + i + 16));
  return i;
}

}  // namespace usaf::cpu::avx512
#pragma GCC diagnostic pop
#endif

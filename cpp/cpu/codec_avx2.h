// NF4 decode of whole blocks with AVX2, by hand; the bits are those of codec_generic.h. A byte shuffle looks up one
// byte of each of a block's 16 values for 32 weights at a time; interleaving the bytes gives the values.
#pragma once
#include <cstdint>

#include "../numerics/bfloat16.h"
#include "../numerics/block_codec.h"
#include "isa.h"

#ifdef USAF_HAS_ISA_LEVELS
#include <immintrin.h>

namespace usaf::cpu::avx2 {

template <bool kStream>
USAF_AVX2 inline void store(void* to, __m256i value) {
  if constexpr (kStream) {
    _mm256_stream_si256(static_cast<__m256i*>(to), value);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(to), value);
  }
}

// Low lane: the codes of 16 weights as bytes, in order; high lane: those of the next 16.
USAF_AVX2 inline __m256i unpack_nibbles(const uint8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), low = _mm_set1_epi8(15);
  const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), second = _mm_and_si128(bytes, low);
  return _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
}

// The first 16 bytes of both lanes' pairs, then the second: undoes what interleaving in lanes does to the order.
template <bool kStream>
USAF_AVX2 inline void store_lanes(uint8_t* to, __m256i a, __m256i b, int64_t lane_bytes) {
  store<kStream>(to, _mm256_permute2x128_si256(a, b, 0x20));
  store<kStream>(to + lane_bytes, _mm256_permute2x128_si256(a, b, 0x31));
}

// table[c]: the 16 values of the block as they are stored.
template <bool kStream>
USAF_AVX2 inline void decode_nf4_block(const uint8_t* codes, const float (&table)[16], float* out) {
  const __m128i columns = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m128i quarter[4];  // byte k of values 4 i .. 4 i + 3 in doubleword k
  for (int i = 0; i < 4; ++i) {
    quarter[i] = _mm_shuffle_epi8(_mm_castps_si128(_mm_loadu_ps(table + 4 * i)), columns);
  }
  const __m128i a = _mm_unpacklo_epi32(quarter[0], quarter[1]), b = _mm_unpacklo_epi32(quarter[2], quarter[3]);
  const __m128i c = _mm_unpackhi_epi32(quarter[0], quarter[1]), d = _mm_unpackhi_epi32(quarter[2], quarter[3]);
  const __m256i plane[4] = {
      _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(a, b)), _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(a, b)),
      _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(c, d)), _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(c, d))};
  for (int64_t i = 0; i < kBlockSize; i += 32) {
    const __m256i index = unpack_nibbles(codes + i / 2);
    __m256i byte[4];
    for (int k = 0; k < 4; ++k) byte[k] = _mm256_shuffle_epi8(plane[k], index);
    const __m256i low01 = _mm256_unpacklo_epi8(byte[0], byte[1]), low23 = _mm256_unpacklo_epi8(byte[2], byte[3]);
    const __m256i high01 = _mm256_unpackhi_epi8(byte[0], byte[1]), high23 = _mm256_unpackhi_epi8(byte[2], byte[3]);
    auto* to = reinterpret_cast<uint8_t*>(out + i);
    store_lanes<kStream>(to, _mm256_unpacklo_epi16(low01, low23), _mm256_unpackhi_epi16(low01, low23), 64);
    store_lanes<kStream>(to + 32, _mm256_unpacklo_epi16(high01, high23), _mm256_unpackhi_epi16(high01, high23), 64);
  }
}

template <bool kStream, class T>
USAF_AVX2 inline void decode_nf4_block(const uint8_t* codes, const T (&table)[16], T* out) {
  const __m128i columns = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const auto* halves = reinterpret_cast<const __m128i*>(table);
  const __m128i first = _mm_shuffle_epi8(_mm_loadu_si128(halves), columns);
  const __m128i second = _mm_shuffle_epi8(_mm_loadu_si128(halves + 1), columns);
  const __m256i low = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(first, second));
  const __m256i high = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(first, second));
  for (int64_t i = 0; i < kBlockSize; i += 32) {
    const __m256i index = unpack_nibbles(codes + i / 2);
    const __m256i low_bytes = _mm256_shuffle_epi8(low, index), high_bytes = _mm256_shuffle_epi8(high, index);
    store_lanes<kStream>(reinterpret_cast<uint8_t*>(out + i), _mm256_unpacklo_epi8(low_bytes, high_bytes),
                         _mm256_unpackhi_epi8(low_bytes, high_bytes), 32);
  }
}

template <Format kFormat, bool kStream, class T>
USAF_AVX2 inline void decode_nf4_blocks(const uint8_t* codes, const typename BlockCodec<kFormat>::Scale* scales,
                                        int64_t num_blocks, T* out) {
  for (int64_t block = 0; block < num_blocks; ++block) {
    const float step = BlockCodec<kFormat>::step(scales[block]);
    T table[16];
    for (int c = 0; c < 16; ++c) table[c] = from_float<T>(kNf4Values[c] * step);
    decode_nf4_block<kStream>(codes + block * (kBlockSize / 2), table, out + block * kBlockSize);
  }
}

}  // namespace usaf::cpu::avx2
#endif

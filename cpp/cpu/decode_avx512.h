// NF4 decode of whole blocks with AVX-512BW: a block's 16 values become one register, and a permute looks up 32 (bf16)
// or 16 (fp32) weights at a time. Chosen at run time; the same bits as the plain path, which every other CPU takes.
#pragma once
#include <cstdint>

#include "../numerics/bfloat16.h"
#include "../numerics/block_codec.h"
#include "isa.h"

#ifdef USAF_HAS_ISA_LEVELS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header: the undefined source of a full mask
#include <immintrin.h>

namespace usaf::cpu {

// A page comes from DRAM once: ask for its codes this far ahead.
inline constexpr int64_t kPrefetchBytes = 2048;

// codes: num_blocks * 32 bytes.
template <Format kFormat>
USAF_AVX512 inline void decode_nf4_blocks(const uint8_t* codes, const typename BlockCodec<kFormat>::Scale* absmax,
                                          int64_t num_blocks, float* out) {
  const __m512 values = _mm512_loadu_ps(kNf4Values);
  for (int64_t block = 0; block < num_blocks; ++block) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + block * (kBlockSize / 2) + kPrefetchBytes), _MM_HINT_T0);
    const __m512 table = _mm512_mul_ps(values, _mm512_set1_ps(BlockCodec<kFormat>::step(absmax[block])));
    for (int64_t i = 0; i < kBlockSize; i += 16) {
      // 8 bytes in 8 quadwords; the permute reads the low 4 bits of each doubleword: high nibble first.
      const auto* bytes = reinterpret_cast<const __m128i*>(codes + block * (kBlockSize / 2) + i / 2);
      const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(bytes));
      const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
      _mm512_storeu_ps(out + block * kBlockSize + i, _mm512_permutexvar_ps(index, table));
    }
  }
}

template <Format kFormat>
USAF_AVX512 inline void decode_nf4_blocks(const uint8_t* codes, const typename BlockCodec<kFormat>::Scale* absmax,
                                          int64_t num_blocks, Bf16* out) {
  const __m512 values = _mm512_loadu_ps(kNf4Values);
  const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1), quiet = _mm512_set1_epi32(0x40);
  for (int64_t block = 0; block < num_blocks; ++block) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + block * (kBlockSize / 2) + kPrefetchBytes), _MM_HINT_T0);
    const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(BlockCodec<kFormat>::step(absmax[block])));
    // to_bf16 of numerics/bfloat16.h, 16 at a time
    const __m512i bits = _mm512_castps_si512(scaled), high = _mm512_srli_epi32(bits, 16);
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(half, _mm512_and_si512(high, one)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_or_epi32(_mm512_srli_epi32(nearest, 16), is_nan, high, quiet);
    const __m512i table = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(rounded));  // twice: bit 4 of an index is noise
    for (int64_t i = 0; i < kBlockSize; i += 32) {
      const auto* bytes = reinterpret_cast<const __m128i*>(codes + block * (kBlockSize / 2) + i / 2);
      const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
      const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
      _mm512_storeu_si512(out + block * kBlockSize + i, _mm512_permutexvar_epi16(index, table));
    }
  }
}

}  // namespace usaf::cpu
#pragma GCC diagnostic pop
#endif

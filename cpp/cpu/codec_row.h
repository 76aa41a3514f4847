// One row, and one block of a row, through the codec: shared by the codec and Adam kernels.
#pragma once
#include <cstdint>

#include "../numerics/bfloat16.h"
#include "../numerics/formats.h"

namespace usaf::cpu {

inline constexpr int64_t kBlockBytes = kBlockSize / 2;

// NF4 block of `count` <= 64 weights; codes: (count + 1) / 2 bytes. Returns the absmax.
float nf4_encode_block(const float* weight, int64_t count, uint8_t* codes);
// Stochastic rounding with one random number a weight.
float nf4_encode_block_stochastic(const float* weight, int64_t count, const uint32_t* random, uint8_t* codes);

void decode_row(Format format, const uint8_t* codes, const float* absmax, int64_t cols, float* out);
void decode_row(Format format, const uint8_t* codes, const float* absmax, int64_t cols, Bf16* out);

// Writes every byte of the row, padding included.
void encode_row(Format format, const float* weight, int64_t cols, uint8_t* codes, float* absmax);
void encode_row(Format format, const Bf16* weight, int64_t cols, uint8_t* codes, float* absmax);

}  // namespace usaf::cpu

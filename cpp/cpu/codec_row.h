// One row, and one block of a row, through the codec: shared by the codec, Adam and expert-layer kernels. `absmax`
// points at the row's or block's scales, of scale_bytes(format) each (not read or written for bf16). The formulas are
// those of numerics/block_codec.h; the bits do not depend on the CPU.
#pragma once
#include <cstdint>

#include "../numerics/bfloat16.h"
#include "../numerics/float16.h"
#include "../numerics/formats.h"

namespace usaf::cpu {

// T is float, Bf16 or F16. Padding of the codes is not read.
template <class T>
void decode_row(Format format, const uint8_t* codes, const void* absmax, int64_t cols, T* out);

// Where the first of several encoded rows (or pieces of rows that start at a whole block) stands, and how far apart
// they are, in bytes. While a row is decoded, the one `prefetch` rows further is asked for.
struct EncodedRows {
  const uint8_t* codes;
  const uint8_t* absmax;
  int64_t code_stride, scale_stride;
  int64_t prefetch;
};

// decode_row for `num_rows` rows of `cols` weights; out_stride in elements.
void decode_rows_of(Format format, const EncodedRows& rows, int64_t num_rows, int64_t cols, Bf16* out,
                    int64_t out_stride);

// Writes every byte of the row, padding included.
template <class T>
void encode_row(Format format, const T* weight, int64_t cols, uint8_t* codes, void* absmax);

// A block of `count` <= 64 weights to used_bytes(format, count) bytes of codes and one scale. `random`: one number a
// weight for stochastic rounding, or null for rounding to nearest.
void encode_block(Format format, const float* weight, int64_t count, const uint32_t* random, uint8_t* codes,
                  void* absmax);
void decode_block(Format format, const uint8_t* codes, const void* absmax, int64_t count, float* out);

}  // namespace usaf::cpu

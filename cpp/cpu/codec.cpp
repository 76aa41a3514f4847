// Encode and decode rows. Threads share the rows; the block loops are what the compiler vectorises.
#include <algorithm>
#include <cstring>

#include "../kernel_api.h"
#include "../numerics/nf4.h"
#include "../numerics/rng.h"
#include "codec_row.h"
#include "decode_avx512.h"
#include "parallel.h"
#include "typed.h"

namespace usaf::cpu {
namespace {

// The 16 values of a block, scaled and rounded once instead of once a weight.
template <class T>
inline void decode_block(const uint8_t* codes, float absmax, int64_t count, T* out) {
  T table[16];
  for (int c = 0; c < 16; ++c) table[c] = from_float<T>(kNf4Values[c] * absmax);
  for (int64_t i = 0; i < count / 2; ++i) {
    out[2 * i] = table[codes[i] >> 4];
    out[2 * i + 1] = table[codes[i] & 15];
  }
  if (count % 2 != 0) out[count - 1] = table[codes[count / 2] >> 4];
}

template <class T>
void decode_nf4_row(const uint8_t* codes, const float* absmax, int64_t cols, T* out) {
  for (int64_t start = 0, block = 0; start < cols; start += kBlockSize, ++block) {
    decode_block(codes + start / 2, absmax[block], std::min(kBlockSize, cols - start), out + start);
  }
}

template <class T>
void decode_nf4(const uint8_t* codes, const float* absmax, int64_t cols, T* out) {
  int64_t blocks = 0;  // done by the fast path
#ifdef USAF_HAS_AVX512_DECODE
  if (cpu_has_avx512bw()) {
    blocks = cols / kBlockSize;
    decode_nf4_blocks(codes, absmax, blocks, out);
  }
#endif
  decode_nf4_row(codes + blocks * kBlockBytes, absmax + blocks, cols - blocks * kBlockSize, out + blocks * kBlockSize);
}

USAF_CLONES void widen(const Bf16* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(values[i]);
}
USAF_CLONES void narrow(const float* values, int64_t count, Bf16* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(values[i]);
}

inline float block_absmax(const float* weight, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, nf4_magnitude(weight[i]));
  return bits_float(largest);
}

inline void pack(const uint32_t (&code)[kBlockSize], int64_t count, uint8_t* codes) {
  for (int64_t i = 0; i < (count + 1) / 2; ++i) {
    codes[i] = static_cast<uint8_t>((code[2 * i] << 4) | code[2 * i + 1]);
  }
}

}  // namespace

USAF_CLONES float nf4_encode_block(const float* weight, int64_t count, uint8_t* codes) {
  const float absmax = block_absmax(weight, count);
  const float inverse = nf4_inverse_scale(absmax);
  uint32_t code[kBlockSize] = {};
  for (int64_t i = 0; i < count; ++i) code[i] = nf4_encode(weight[i] * inverse);
  pack(code, count, codes);
  return absmax;
}

USAF_CLONES float nf4_encode_block_stochastic(const float* weight, int64_t count, const uint32_t* random,
                                              uint8_t* codes) {
  const float absmax = block_absmax(weight, count);
  const float inverse = nf4_inverse_scale(absmax);
  uint32_t code[kBlockSize] = {};
  for (int64_t i = 0; i < count; ++i) {
    code[i] = nf4_encode_stochastic(weight[i] * inverse, to_uniform(random[i]));
  }
  pack(code, count, codes);
  return absmax;
}

void decode_row(Format format, const uint8_t* codes, const float* absmax, int64_t cols, float* out) {
  if (format == Format::nf4) {
    decode_nf4(codes, absmax, cols, out);
  } else {
    widen(reinterpret_cast<const Bf16*>(codes), cols, out);
  }
}

void decode_row(Format format, const uint8_t* codes, const float* absmax, int64_t cols, Bf16* out) {
  if (format == Format::nf4) {
    decode_nf4(codes, absmax, cols, out);
  } else {
    std::memcpy(out, codes, static_cast<size_t>(2 * cols));
  }
}

void encode_row(Format format, const float* weight, int64_t cols, uint8_t* codes, float* absmax) {
  const int64_t used = format == Format::nf4 ? (cols + 1) / 2 : 2 * cols;
  if (format == Format::nf4) {
    for (int64_t start = 0, block = 0; start < cols; start += kBlockSize, ++block) {
      absmax[block] = nf4_encode_block(weight + start, std::min(kBlockSize, cols - start), codes + start / 2);
    }
  } else {
    narrow(weight, cols, reinterpret_cast<Bf16*>(codes));
  }
  std::memset(codes + used, 0, static_cast<size_t>(code_bytes(format, cols) - used));
}

void encode_row(Format format, const Bf16* weight, int64_t cols, uint8_t* codes, float* absmax) {
  if (format == Format::bf16) {
    std::memcpy(codes, weight, static_cast<size_t>(2 * cols));
    std::memset(codes + 2 * cols, 0, static_cast<size_t>(code_bytes(format, cols) - 2 * cols));
    return;
  }
  float block_weight[kBlockSize];
  for (int64_t start = 0, block = 0; start < cols; start += kBlockSize, ++block) {
    const int64_t count = std::min(kBlockSize, cols - start);
    widen(weight + start, count, block_weight);
    absmax[block] = nf4_encode_block(block_weight, count, codes + start / 2);
  }
  const int64_t used = (cols + 1) / 2;
  std::memset(codes + used, 0, static_cast<size_t>(code_bytes(format, cols) - used));
}

void encode_rows(const EncodeRowsArgs& args, void*) {
  const int64_t stride = code_bytes(args.format, args.cols), blocks = num_blocks(args.format, args.cols);
  with_type(args.weight_dtype, [&]<class T>(T) {
    const T* weight = static_cast<const T*>(args.weight);
    parallel_for(args.num_rows, args.cols, [&](int64_t r) {
      const int64_t row = args.row_index ? args.row_index[r] : r;
      encode_row(args.format, weight + r * args.weight_stride, args.cols, args.codes + row * stride,
                 args.absmax + row * blocks);
    });
  });
}

void decode_rows(const DecodeRowsArgs& args, void*) {
  const int64_t stride = code_bytes(args.format, args.cols), blocks = num_blocks(args.format, args.cols);
  with_type(args.out_dtype, [&]<class T>(T) {
    T* out = static_cast<T*>(args.out);
    parallel_for(args.num_rows, args.cols, [&](int64_t r) {
      const int64_t row = args.row_index ? args.row_index[r] : r;
      const int64_t target = args.out_index ? args.out_index[r] : r;
      decode_row(args.format, args.codes + row * stride, args.absmax + row * blocks, args.cols,
                 out + target * args.out_stride);
    });
  });
}

}  // namespace usaf::cpu

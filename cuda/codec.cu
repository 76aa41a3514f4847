// The weight codec on NVIDIA GPUs: rows of fp32, bf16 or fp16 to and from the formats of numerics/formats.h.
//
// One lane moves 16 bytes of weights at a time (a "pack": 4 fp32 or 8 of 16 bits), so a block of 64 weights is 16 or 8
// neighbouring lanes, which find its absmax with shuffles. A pack's codes are 2 to 16 bytes, read or written at once. A
// thread block is blockDim.x packs of a row wide and blockDim.y rows high, and each thread starts the loads of four
// rows before it uses the first. NF4 looks values and codes up in shared tables: 16 or 32 entries, each in a bank of
// its own, so no two lanes ever conflict. Bytes moved: per weight its own 2 or 4, and code_bytes + scale_bytes *
// num_blocks per row; the codec is bandwidth-bound.
#include <type_traits>

#include "gpu/alignment.h"
#include "kernel_api.h"
#include "launch.h"
#include "numerics/block_codec.h"
#include "pack.h"
#include "shared_tables.h"
#include "with_format.h"

namespace usaf::gpu {
namespace {

constexpr int kRowsInFlight = 4;

template <class T>
constexpr int kLanes = kBlockSize / kPack<T>;  // lanes that share a block of weights

// A pack's codes: up to four words, of which the first kCodeBytes count.
struct Codes {
  uint32_t word[4];
};
template <Format kFormat, class T>
constexpr int kCodeBytes = static_cast<int>(kPack<T> * code_bits(kFormat) / 8);

template <int kBytes>
__device__ __forceinline__ Codes load_codes(const uint8_t* source) {
  if constexpr (kBytes == 2) {
    return {{__ldg(reinterpret_cast<const unsigned short*>(source))}};
  } else if constexpr (kBytes == 4) {
    return {{__ldg(reinterpret_cast<const unsigned*>(source))}};
  } else if constexpr (kBytes == 8) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(source));
    return {{words.x, words.y}};
  } else {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(source));
    return {{words.x, words.y, words.z, words.w}};
  }
}

template <int kBytes>
__device__ __forceinline__ void store_codes(uint8_t* target, const Codes& codes) {
  const auto& word = codes.word;
  if constexpr (kBytes == 2) {
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(word[0]);
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<uint32_t*>(target) = word[0];
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(target) = make_uint2(word[0], word[1]);
  } else {
    *reinterpret_cast<uint4*>(target) = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

__device__ __forceinline__ float load_scale(const float* scale) { return __ldg(scale); }
__device__ __forceinline__ F16 load_scale(const F16* scale) {
  return F16{__ldg(reinterpret_cast<const unsigned short*>(scale))};
}

// Where code i of a pack stands: its word, and its lowest bit there.
template <Format kFormat>
__device__ __forceinline__ constexpr int word_of(int i) {
  return i * static_cast<int>(code_bits(kFormat)) / 32;
}
template <Format kFormat>
__device__ __forceinline__ constexpr int shift_of(int i) {
  return is_nf4(kFormat) ? nf4_shift(i) : i * static_cast<int>(code_bits(kFormat)) % 32;
}

// A thread's rows of a turn: blockDim.y apart. What can be is 32-bit arithmetic.
struct RowsInFlight {
  int64_t mine;
  int left;

  __device__ __forceinline__ RowsInFlight(int64_t first, int64_t num_rows) : mine(first + threadIdx.y) {
    const int64_t rest = num_rows - mine;
    left = static_cast<int>(rest < kRowsInFlight * kThreads ? rest : kRowsInFlight * kThreads);
  }
  __device__ __forceinline__ bool has(int j) const { return j * static_cast<int>(blockDim.y) < left; }
  // Row j, or what `index` has for it; -1 where there is none.
  __device__ __forceinline__ void find(const int64_t* index, int64_t (&row)[kRowsInFlight]) const {
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) row[j] = has(j) ? mine + j * static_cast<int>(blockDim.y) : -1;
    if (!index) return;
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (has(j)) row[j] = __ldg(index + row[j]);
    }
  }
};

// The scale of the block that this lane's pack is part of. All lanes of a warp come here together: the shuffles need
// every one.
template <Format kFormat, class T>
__device__ __forceinline__ typename BlockCodec<kFormat>::Scale block_scale(const float (&weight)[kPack<T>]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) largest = max(largest, magnitude_bits(weight[i]));
#pragma unroll
  for (int lane = kLanes<T> / 2; lane > 0; lane /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, lane));
  }
  return BlockCodec<kFormat>::make_scale(bits_float(largest));
}

// Where a thread writes of row 0, and what: nothing (null) past the row's end or where another lane has the block.
template <Format kFormat>
struct EncodeTarget {
  uint8_t* codes;
  typename ScaleOf<kFormat>::type* scale;
  uint32_t used;  // bits of NF4's codes within the row; other formats' codes of the zeros past its end are 0
};

template <Format kFormat, class T>
__device__ __forceinline__ EncodeTarget<kFormat> encode_target(const EncodeRowsArgs& args, int64_t col) {
  EncodeTarget<kFormat> target = {};
  const int64_t start = col * code_bits(kFormat) / 8, left = args.cols - col;
  if (start < code_bytes(kFormat, args.cols)) target.codes = args.codes + start;
  if (kFormat != Format::bf16 && left > 0 && col % kBlockSize == 0) {
    target.scale = static_cast<typename ScaleOf<kFormat>::type*>(args.absmax) + col / kBlockSize;
  }
  target.used = nf4_mask(static_cast<int>(left < 0 ? 0 : left < kPack<T> ? left : 8));
  return target;
}

// Codes and scale of one pack of one row; `row` is negative where there is none.
template <Format kFormat, class T>
__device__ __forceinline__ void encode_pack(uint4 pack, const EncodeTarget<kFormat>& target, int64_t row, int64_t cols,
                                            const Nf4Lookup<64>& lookup) {
  Codes codes = {};
  if constexpr (kFormat == Format::bf16 && std::is_same_v<T, Bf16>) {
    codes = {{pack.x, pack.y, pack.z, pack.w}};
  } else {
    float weight[kPack<T>];
    unpack(pack, weight, T{});
    float inverse = 1.0f;
    if constexpr (kFormat != Format::bf16) {
      const auto scale = block_scale<kFormat, T>(weight);
      inverse = inverse_step(BlockCodec<kFormat>::step(scale));
      if (row >= 0 && target.scale) target.scale[row * num_blocks(kFormat, cols)] = scale;
    }
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      uint32_t code;
      if constexpr (kFormat == Format::bf16) {
        code = to_bf16(weight[i]).bits;
      } else if constexpr (is_nf4(kFormat)) {
        code = nf4_encode(lookup, weight[i] * inverse);
      } else {
        code = BlockCodec<kFormat>::encode(weight[i] * inverse);
      }
      codes.word[word_of<kFormat>(i)] += code << shift_of<kFormat>(i);
    }
    if constexpr (is_nf4(kFormat)) codes.word[0] &= target.used;
  }
  if (row >= 0 && target.codes) {
    store_codes<kCodeBytes<kFormat, T>>(target.codes + row * code_bytes(kFormat, cols), codes);
  }
}

template <Format kFormat, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) encode_kernel(EncodeRowsArgs args, bool aligned) {
  __shared__ Nf4Lookup<64> lookup;
  if constexpr (is_nf4(kFormat)) {
    copy_table(lookup, kNf4.lookup, threadIdx.y * blockDim.x + threadIdx.x, kThreads);
    __syncthreads();
  }
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPack<T>;
  const EncodeTarget<kFormat> target = encode_target<kFormat, T>(args, col);
  const bool whole = is_whole<T>(col, args.cols, aligned);
  const int64_t block_rows = int64_t{blockDim.y} * kRowsInFlight;
  for (int64_t first = blockIdx.y * block_rows; first < args.num_rows; first += gridDim.y * block_rows) {
    const RowsInFlight rows(first, args.num_rows);
    const T* weight = static_cast<const T*>(args.weight) + rows.mine * args.weight_stride;
    const int64_t between = blockDim.y * args.weight_stride;
    uint4 pack[kRowsInFlight] = {};
    if (whole) {
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        if (rows.has(j)) pack[j] = load_pack(weight + j * between, col, args.cols, true);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        if (rows.has(j)) pack[j] = load_pack(weight + j * between, col, args.cols, false);
      }
    }
    int64_t to[kRowsInFlight];
    rows.find(args.row_index, to);
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) encode_pack<kFormat, T>(pack[j], target, to[j], args.cols, lookup);
  }
}

// The weights of one pack. `values`: NF4's.
template <Format kFormat, class T>
__device__ __forceinline__ uint4 decode_pack(const Codes& codes, float step, const float (&values)[16]) {
  if constexpr (kFormat == Format::bf16 && std::is_same_v<T, Bf16>) {
    return make_uint4(codes.word[0], codes.word[1], codes.word[2], codes.word[3]);
  } else {
    float weight[kPack<T>];
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const uint32_t bits = codes.word[word_of<kFormat>(i)] >> shift_of<kFormat>(i);
      if constexpr (kFormat == Format::bf16) {
        weight[i] = to_float(Bf16{static_cast<uint16_t>(bits)});
      } else if constexpr (is_nf4(kFormat)) {
        weight[i] = values[bits & 15u] * step;
      } else {
        weight[i] = BlockCodec<kFormat>::value(bits & 255u) * step;
      }
    }
    return repack(weight, T{});
  }
}

template <Format kFormat, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) decode_kernel(DecodeRowsArgs args, bool aligned) {
  __shared__ float values[16];
  if constexpr (is_nf4(kFormat)) {
    copy_table(values, kNf4.value, threadIdx.y * blockDim.x + threadIdx.x, kThreads);
    __syncthreads();
  }
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPack<T>;
  if (col >= args.cols) return;
  const bool whole = is_whole<T>(col, args.cols, aligned);
  const int64_t stride = code_bytes(kFormat, args.cols), blocks = num_blocks(kFormat, args.cols);
  const uint8_t* first_codes = args.codes + col * code_bits(kFormat) / 8;
  const auto* first_scale = static_cast<const typename ScaleOf<kFormat>::type*>(args.absmax) + col / kBlockSize;
  const int64_t block_rows = int64_t{blockDim.y} * kRowsInFlight;
  for (int64_t first = blockIdx.y * block_rows; first < args.num_rows; first += gridDim.y * block_rows) {
    Codes codes[kRowsInFlight];
    typename ScaleOf<kFormat>::type scale[kRowsInFlight];
    int64_t source[kRowsInFlight], target[kRowsInFlight];
    const RowsInFlight rows(first, args.num_rows);
    rows.find(args.row_index, source);
    rows.find(args.out_index, target);
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (!rows.has(j)) continue;
      codes[j] = load_codes<kCodeBytes<kFormat, T>>(first_codes + source[j] * stride);
      if constexpr (kFormat != Format::bf16) scale[j] = load_scale(first_scale + source[j] * blocks);
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (!rows.has(j)) continue;
      float step = 1.0f;
      if constexpr (kFormat != Format::bf16) step = BlockCodec<kFormat>::step(scale[j]);
      store_pack(static_cast<T*>(args.out) + target[j] * args.out_stride, col, args.cols, whole,
                 decode_pack<kFormat, T>(codes[j], step, values));
    }
  }
}

template <Format kFormat, class T>
void launch_encode(const EncodeRowsArgs& args, void* stream) {
  // Every byte of the codes is written, so the padding counts as weights.
  const int64_t padded = code_bytes(kFormat, args.cols) * 8 / code_bits(kFormat);
  const LaunchShape shape = launch_shape(kRowsInFlight, args.num_rows, (padded + kPack<T> - 1) / kPack<T>);
  const bool wide = aligned(args.weight, args.weight_stride * int64_t{sizeof(T)});
  launch("encode_rows", encode_kernel<kFormat, T>, shape.grid, shape.block, stream, args, wide);
}

template <Format kFormat, class T>
void launch_decode(const DecodeRowsArgs& args, void* stream) {
  const LaunchShape shape = launch_shape(kRowsInFlight, args.num_rows, (args.cols + kPack<T> - 1) / kPack<T>);
  const bool wide = aligned(args.out, args.out_stride * int64_t{sizeof(T)});
  launch("decode_rows", decode_kernel<kFormat, T>, shape.grid, shape.block, stream, args, wide);
}

// body.operator()<kFormat, T>() with the format and the type of the weights.
template <class Body>
void with_types(Format format, DType dtype, const Body& body) {
  const auto with_dtype = [&]<Format kFormat>() {
    dtype == DType::f32    ? body.template operator()<kFormat, float>()
    : dtype == DType::bf16 ? body.template operator()<kFormat, Bf16>()
                           : body.template operator()<kFormat, F16>();
  };
  with_format(format, with_dtype);
}

}  // namespace

void encode_rows(const EncodeRowsArgs& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  check_codes(args.codes);
  with_types(args.format, args.weight_dtype,
             [&]<Format kFormat, class T>() { launch_encode<kFormat, T>(args, stream); });
}

void decode_rows(const DecodeRowsArgs& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  check_codes(args.codes);
  with_types(args.format, args.out_dtype, [&]<Format kFormat, class T>() { launch_decode<kFormat, T>(args, stream); });
}

}  // namespace usaf::gpu

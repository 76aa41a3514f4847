// The weight codec on NVIDIA GPUs: rows of fp32 or bf16 to and from the formats of numerics/formats.h.
//
// One lane moves 16 bytes of weights at a time (a "pack": 4 fp32 or 8 bf16), so a block of 64 weights is 16 or 8
// neighbouring lanes, which find its absmax with shuffles. A thread block is blockDim.x packs of a row wide and
// blockDim.y rows high, and each thread starts the loads of four rows before it uses the first. Decoding looks codes up
// in a shared table: 16 entries in 16 banks, so no two lanes ever conflict.
// Bytes moved: per weight its own 2 or 4, and code_bytes + 4 * num_blocks per row; the codec is bandwidth-bound.
#include <algorithm>
#include <stdexcept>

#include "kernel_api.h"
#include "launch.h"
#include "numerics/bfloat16.h"
#include "numerics/block_scale.h"
#include "numerics/nf4.h"

namespace usaf::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 3;  // up to 85 registers: left alone, ptxas stops at 64 for sm_120 and spills
constexpr int kRowsInFlight = 4;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int64_t kMaxGridX = 2147483647;

template <class T>
constexpr int kPack = 16 / sizeof(T);  // weights in one 16-byte access
template <class T>
constexpr int kLanes = kBlockSize / kPack<T>;  // lanes that share a block of weights

// Bytes of a pack's codes as the widest integer that one lane reads or writes.
template <class T>
struct Nf4Word;
template <>
struct Nf4Word<float> {
  using type = uint16_t;
};
template <>
struct Nf4Word<Bf16> {
  using type = uint32_t;
};

__device__ __forceinline__ void unpack(uint4 pack, float (&weight)[4]) {
  weight[0] = bits_float(pack.x), weight[1] = bits_float(pack.y);
  weight[2] = bits_float(pack.z), weight[3] = bits_float(pack.w);
}

__device__ __forceinline__ void unpack(uint4 pack, float (&weight)[8]) {
  const uint32_t words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weight[2 * i] = to_float(Bf16{static_cast<uint16_t>(words[i])});
    weight[2 * i + 1] = to_float(Bf16{static_cast<uint16_t>(words[i] >> 16)});
  }
}

__device__ __forceinline__ uint32_t pair_bits(float low, float high) {
  return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}

__device__ __forceinline__ uint4 repack(const float (&weight)[4]) {
  return make_uint4(float_bits(weight[0]), float_bits(weight[1]), float_bits(weight[2]), float_bits(weight[3]));
}

__device__ __forceinline__ uint4 repack(const float (&weight)[8]) {
  return make_uint4(pair_bits(weight[0], weight[1]), pair_bits(weight[2], weight[3]), pair_bits(weight[4], weight[5]),
                    pair_bits(weight[6], weight[7]));
}

// The pack at `col`; zeros past the row's end.
template <bool kAligned>
__device__ __forceinline__ uint4 load_pack(const float* row, int64_t col, int64_t cols) {
  if (kAligned && col + 4 <= cols) return __ldg(reinterpret_cast<const uint4*>(row + col));
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = col + i < cols ? float_bits(__ldg(row + col + i)) : 0u;
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool kAligned>
__device__ __forceinline__ uint4 load_pack(const Bf16* row, int64_t col, int64_t cols) {
  if (kAligned && col + 8 <= cols) return __ldg(reinterpret_cast<const uint4*>(row + col));
  const auto* bits = reinterpret_cast<const unsigned short*>(row);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = col + 2 * i < cols ? __ldg(bits + col + 2 * i) : 0u;
    const uint32_t high = col + 2 * i + 1 < cols ? __ldg(bits + col + 2 * i + 1) : 0u;
    words[i] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool kAligned>
__device__ __forceinline__ void store_pack(float* row, int64_t col, int64_t cols, uint4 pack) {
  if (kAligned && col + 4 <= cols) {
    *reinterpret_cast<uint4*>(row + col) = pack;
    return;
  }
  const uint32_t words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (col + i < cols) row[col + i] = bits_float(words[i]);
  }
}

template <bool kAligned>
__device__ __forceinline__ void store_pack(Bf16* row, int64_t col, int64_t cols, uint4 pack) {
  if (kAligned && col + 8 <= cols) {
    *reinterpret_cast<uint4*>(row + col) = pack;
    return;
  }
  const uint32_t words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (col + i < cols) row[col + i] = Bf16{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))};
  }
}

// bf16 codes are a row of bf16 weights. Their rows are padded to 16 bytes, so whole words are always there.
__device__ __forceinline__ uint4 load_bf16_codes(const uint8_t* row, int64_t col, const float*) {
  const uint2 half = __ldg(reinterpret_cast<const uint2*>(row + 2 * col));
  return make_uint4(half.x << 16, half.x & 0xffff0000u, half.y << 16, half.y & 0xffff0000u);
}
__device__ __forceinline__ uint4 load_bf16_codes(const uint8_t* row, int64_t col, const Bf16*) {
  return __ldg(reinterpret_cast<const uint4*>(row + 2 * col));
}

__device__ __forceinline__ void store_bf16_codes(uint8_t* row, int64_t col, uint4 pack, const float*) {
  *reinterpret_cast<uint2*>(row + 2 * col) =
      make_uint2(pair_bits(bits_float(pack.x), bits_float(pack.y)), pair_bits(bits_float(pack.z), bits_float(pack.w)));
}
__device__ __forceinline__ void store_bf16_codes(uint8_t* row, int64_t col, uint4 pack, const Bf16*) {
  *reinterpret_cast<uint4*>(row + 2 * col) = pack;
}

__device__ __forceinline__ int64_t indexed(const int64_t* index, int64_t row) {
  return index ? __ldg(index + row) : row;
}

// Codes and absmax of one pack of one row. All lanes of a warp come here together: the shuffles need every one.
template <class T>
__device__ __forceinline__ void encode_nf4_pack(uint4 pack, const EncodeRowsArgs& args, int64_t row, int64_t col,
                                                bool live) {
  float weight[kPack<T>];
  unpack(pack, weight);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) largest = max(largest, magnitude_bits(weight[i]));
#pragma unroll
  for (int lane = kLanes<T> / 2; lane > 0; lane /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, lane));
  }
  const float absmax = bits_float(largest);
  const float inverse = inverse_step(absmax);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    codes |= (col + i < args.cols ? nf4_encode(weight[i] * inverse) : 0u) << nf4_shift(i);
  }
  using Word = typename Nf4Word<T>::type;
  const int64_t stride = code_bytes(Format::nf4, args.cols);
  if (live && col / 2 < stride) {
    *reinterpret_cast<Word*>(args.codes + row * stride + col / 2) = static_cast<Word>(codes);
  }
  if (live && col < args.cols && col % kBlockSize == 0) {
    static_cast<float*>(args.absmax)[row * num_blocks(Format::nf4, args.cols) + col / kBlockSize] = absmax;
  }
}

template <Format kFormat, class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) encode_kernel(EncodeRowsArgs args) {
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPack<T>;
  const int64_t block_rows = int64_t{blockDim.y} * kRowsInFlight;
  for (int64_t first = blockIdx.y * block_rows; first < args.num_rows; first += gridDim.y * block_rows) {
    uint4 pack[kRowsInFlight];
    int64_t target[kRowsInFlight];
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int64_t row = first + j * blockDim.y + threadIdx.y;
      const bool live = row < args.num_rows;
      target[j] = live ? indexed(args.row_index, row) : -1;
      pack[j] = live
                    ? load_pack<kAligned>(static_cast<const T*>(args.weight) + row * args.weight_stride, col, args.cols)
                    : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const bool live = target[j] >= 0;
      if constexpr (kFormat == Format::nf4) {
        encode_nf4_pack<T>(pack[j], args, target[j], col, live);
      } else {
        const int64_t stride = code_bytes(Format::bf16, args.cols);
        if (live && 2 * col < stride) {
          store_bf16_codes(args.codes + target[j] * stride, col, pack[j], static_cast<const T*>(nullptr));
        }
      }
    }
  }
}

template <class T>
__device__ __forceinline__ uint4 decode_nf4_pack(uint32_t codes, float absmax, const float* table) {
  float weight[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) weight[i] = table[codes >> nf4_shift(i) & 15u] * absmax;
  return repack(weight);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) decode_nf4_kernel(DecodeRowsArgs args) {
  __shared__ float table[16];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread < 16) {
    float value = 0.0f;
#pragma unroll
    for (int code = 0; code < 16; ++code) value = thread == code ? nf4_value(code) : value;
    table[thread] = value;
  }
  __syncthreads();
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPack<T>;
  if (col >= args.cols) return;
  const int64_t stride = code_bytes(Format::nf4, args.cols), blocks = num_blocks(Format::nf4, args.cols);
  const int64_t block_rows = int64_t{blockDim.y} * kRowsInFlight;
  for (int64_t first = blockIdx.y * block_rows; first < args.num_rows; first += gridDim.y * block_rows) {
    uint32_t codes[kRowsInFlight];
    float absmax[kRowsInFlight];
    int64_t target[kRowsInFlight];
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int64_t row = first + j * blockDim.y + threadIdx.y;
      target[j] = -1;
      if (row >= args.num_rows) continue;
      const int64_t source = indexed(args.row_index, row);
      target[j] = indexed(args.out_index, row);
      codes[j] = __ldg(reinterpret_cast<const typename Nf4Word<T>::type*>(args.codes + source * stride + col / 2));
      absmax[j] = __ldg(static_cast<const float*>(args.absmax) + source * blocks + col / kBlockSize);
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (target[j] < 0) continue;
      store_pack<kAligned>(static_cast<T*>(args.out) + target[j] * args.out_stride, col, args.cols,
                           decode_nf4_pack<T>(codes[j], absmax[j], table));
    }
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) decode_bf16_kernel(DecodeRowsArgs args) {
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPack<T>;
  if (col >= args.cols) return;
  const int64_t stride = code_bytes(Format::bf16, args.cols);
  const int64_t block_rows = int64_t{blockDim.y} * kRowsInFlight;
  for (int64_t first = blockIdx.y * block_rows; first < args.num_rows; first += gridDim.y * block_rows) {
    uint4 pack[kRowsInFlight];
    int64_t target[kRowsInFlight];
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int64_t row = first + j * blockDim.y + threadIdx.y;
      target[j] = -1;
      if (row >= args.num_rows) continue;
      target[j] = indexed(args.out_index, row);
      pack[j] =
          load_bf16_codes(args.codes + indexed(args.row_index, row) * stride, col, static_cast<const T*>(nullptr));
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (target[j] < 0) continue;
      store_pack<kAligned>(static_cast<T*>(args.out) + target[j] * args.out_stride, col, args.cols, pack[j]);
    }
  }
}

struct LaunchShape {
  dim3 grid, block;
};

// Blocks as wide as the row, up to all threads; what is left of the threads goes to more rows.
LaunchShape launch_shape(int64_t num_rows, int64_t packs) {
  int width = 16;  // a warp's lanes must hold whole blocks of weights
  while (width < kThreads && width < packs) width *= 2;
  const int height = kThreads / width;
  const int64_t grid_x = (packs + width - 1) / width;
  const int64_t grid_y = (num_rows + height * kRowsInFlight - 1) / (height * kRowsInFlight);
  if (grid_x > kMaxGridX) throw std::invalid_argument("cols: a row is too long for the GPU codec");
  return {dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(std::min(grid_y, kMaxGridY))),
          dim3(static_cast<unsigned>(width), static_cast<unsigned>(height))};
}

bool aligned(const void* pointer, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

void check_supported(Format format, DType dtype) {
  if (format != Format::bf16 && format != Format::nf4) throw std::invalid_argument("format: not on the GPU yet");
  if (dtype == DType::f16) throw std::invalid_argument("dtype: float16 is not on the GPU yet");
}

void check_codes(const uint8_t* codes) {
  if (!aligned(codes, 0)) throw std::invalid_argument("codes: expected an address that is a multiple of 16");
}

template <Format kFormat, class T>
void launch_encode(const EncodeRowsArgs& args, void* stream) {
  // Every byte of the codes is written, so the padding counts as weights.
  const int64_t bytes = code_bytes(kFormat, args.cols);
  const int64_t padded = kFormat == Format::nf4 ? 2 * bytes : bytes / 2;
  const LaunchShape shape = launch_shape(args.num_rows, (padded + kPack<T> - 1) / kPack<T>);
  const bool wide = aligned(args.weight, args.weight_stride * int64_t{sizeof(T)});
  launch("encode_rows", wide ? encode_kernel<kFormat, T, true> : encode_kernel<kFormat, T, false>, shape.grid,
         shape.block, stream, args);
}

template <class T>
void launch_decode(const DecodeRowsArgs& args, void* stream) {
  const LaunchShape shape = launch_shape(args.num_rows, (args.cols + kPack<T> - 1) / kPack<T>);
  const bool wide = aligned(args.out, args.out_stride * int64_t{sizeof(T)});
  const auto nf4 = wide ? decode_nf4_kernel<T, true> : decode_nf4_kernel<T, false>;
  const auto bf16 = wide ? decode_bf16_kernel<T, true> : decode_bf16_kernel<T, false>;
  launch("decode_rows", args.format == Format::nf4 ? nf4 : bf16, shape.grid, shape.block, stream, args);
}

}  // namespace

void encode_rows(const EncodeRowsArgs& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  check_codes(args.codes);
  check_supported(args.format, args.weight_dtype);
  const bool f32 = args.weight_dtype == DType::f32;
  if (args.format == Format::nf4) {
    f32 ? launch_encode<Format::nf4, float>(args, stream) : launch_encode<Format::nf4, Bf16>(args, stream);
  } else {
    f32 ? launch_encode<Format::bf16, float>(args, stream) : launch_encode<Format::bf16, Bf16>(args, stream);
  }
}

void decode_rows(const DecodeRowsArgs& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  check_codes(args.codes);
  check_supported(args.format, args.out_dtype);
  args.out_dtype == DType::f32 ? launch_decode<float>(args, stream) : launch_decode<Bf16>(args, stream);
}

}  // namespace usaf::gpu

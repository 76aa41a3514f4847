// The weight codec on AMD GPUs: rows of fp32 or bf16 to and from the formats of numerics/formats.h.
//
// Written for RDNA2 (wave32), right on any wave size. A workgroup lies along one row and works on four rows; which rows
// is uniform over the workgroup, so row lists and row addresses are scalar work (SALU, s_load) and the vector unit only
// sees weights. Each lane starts its loads of all four rows before it uses the first, 16 bytes of weights at a time
// (4 fp32 or 8 bf16: a "pack"). Decoding reads a 16-entry LDS table, whose entries lie in 16 banks: no conflicts. A
// block's absmax is found among its 16 or 8 neighbouring lanes.
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

constexpr int kMaxThreads = 256;
constexpr int kMinThreads = 64;                                      // a whole wave on every chip
constexpr int kRows = 4;                                             // rows of a workgroup, all in flight
constexpr int64_t kMaxGridX = (int64_t{1} << 32) / kMaxThreads - 1;  // a grid has under 2^32 threads

template <class T>
struct Layout {
  static constexpr int kPack = 16 / sizeof(T);       // weights a lane holds
  static constexpr int kLanes = kBlockSize / kPack;  // lanes that share a block of weights
};

struct alignas(16) Pack {
  uint32_t word[4];
};

// One 16-byte access. As a single integer: a struct of words would be taken apart and merged with the tail's accesses.
using Wide = unsigned __int128;

__device__ __forceinline__ Pack load_wide(const void* source) {
  const Wide raw = *static_cast<const Wide*>(source);
  return {{static_cast<uint32_t>(raw), static_cast<uint32_t>(raw >> 32), static_cast<uint32_t>(raw >> 64),
           static_cast<uint32_t>(raw >> 96)}};
}

__device__ __forceinline__ void store_wide(void* target, const Pack& pack) {
  *static_cast<Wide*>(target) =
      Wide{pack.word[3]} << 96 | Wide{pack.word[2]} << 64 | Wide{pack.word[1]} << 32 | Wide{pack.word[0]};
}

// Weight `i` of a pack, as fp32.
template <class T>
__device__ __forceinline__ float weight_of(const Pack& pack, int i) {
  if constexpr (sizeof(T) == 4) {
    return bits_float(pack.word[i]);
  } else {
    return bits_float(i % 2 == 0 ? pack.word[i / 2] << 16 : pack.word[i / 2] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  return static_cast<uint32_t>(to_bf16(high).bits) << 16 | to_bf16(low).bits;
}

// The pack at `col`, zeros past the row's end. A pack that does not end in the row, or starts at an odd address, is put
// together weight by weight.
template <bool kAligned, class T>
__device__ __forceinline__ Pack load_weights(const T* __restrict__ row, int64_t col, int64_t cols) {
  constexpr int kPack = Layout<T>::kPack;
  if (kAligned && col + kPack <= cols) return load_wide(row + col);
  Pack pack = {};
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (col + i >= cols) continue;
    if constexpr (sizeof(T) == 4) {
      pack.word[i] = float_bits(row[col + i]);
    } else {
      pack.word[i / 2] |= static_cast<uint32_t>(row[col + i].bits) << (i % 2 * 16);
    }
  }
  return pack;
}

template <bool kAligned, class T>
__device__ __forceinline__ void store_weights(T* __restrict__ row, int64_t col, int64_t cols, const Pack& pack) {
  constexpr int kPack = Layout<T>::kPack;
  if (kAligned && col + kPack <= cols) {
    store_wide(row + col, pack);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (col + i >= cols) continue;
    if constexpr (sizeof(T) == 4) {
      row[col + i] = bits_float(pack.word[i]);
    } else {
      row[col + i] = Bf16{static_cast<uint16_t>(pack.word[i / 2] >> (i % 2 * 16))};
    }
  }
}

// Largest magnitude among the lanes that share a block of weights. Every lane of the wave takes part.
template <class T>
__device__ __forceinline__ uint32_t block_magnitude(const Pack& pack) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < Layout<T>::kPack; ++i) largest = max(largest, magnitude_bits(weight_of<T>(pack, i)));
#pragma unroll
  for (int lane = Layout<T>::kLanes / 2; lane > 0; lane /= 2) {
    largest = max(largest, static_cast<uint32_t>(__shfl_xor(static_cast<int>(largest), lane, Layout<T>::kLanes)));
  }
  return largest;
}

template <class T>
__device__ __forceinline__ void store_nf4(uint8_t* __restrict__ target, uint32_t codes) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(codes);
  } else {
    *reinterpret_cast<uint32_t*>(target) = codes;
  }
}

template <class T>
__device__ __forceinline__ uint32_t load_nf4(const uint8_t* __restrict__ source) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const uint16_t*>(source);
  } else {
    return *reinterpret_cast<const uint32_t*>(source);
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    encode_nf4_kernel(const T* __restrict__ weight, uint8_t* __restrict__ codes, float* __restrict__ absmax,
                      const int64_t* __restrict__ row_index, int64_t num_rows, int64_t cols, int64_t weight_stride) {
  using L = Layout<T>;
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * L::kPack;
  const int64_t stride = code_bytes(Format::nf4, cols), blocks = num_blocks(Format::nf4, cols);
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_rows; first += int64_t{gridDim.y} * kRows) {
    Pack pack[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r < num_rows) pack[r] = load_weights<kAligned>(weight + (first + r) * weight_stride, col, cols);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float scale = bits_float(block_magnitude<T>(pack[r]));
      if (first + r >= num_rows) continue;
      const int64_t target = row_index ? row_index[first + r] : first + r;
      const float inverse = inverse_step(scale);
      uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < L::kPack; ++i) {
        const uint32_t code = nf4_encode(weight_of<T>(pack[r], i) * inverse);
        packed |= (col + i < cols ? code : 0u) << nf4_shift(i);
      }
      if (col / 2 < stride) store_nf4<T>(codes + target * stride + col / 2, packed);
      if (col < cols && threadIdx.x % L::kLanes == 0) absmax[target * blocks + col / kBlockSize] = scale;
    }
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    decode_nf4_kernel(const uint8_t* __restrict__ codes, const float* __restrict__ absmax, T* __restrict__ out,
                      const int64_t* __restrict__ row_index, const int64_t* __restrict__ out_index, int64_t num_rows,
                      int64_t cols, int64_t out_stride) {
  using L = Layout<T>;
  __shared__ float table[16];
  if (threadIdx.x < 16) {
    float value = 0.0f;
#pragma unroll
    for (unsigned code = 0; code < 16; ++code) value = threadIdx.x == code ? nf4_value(code) : value;
    table[threadIdx.x] = value;
  }
  __syncthreads();
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * L::kPack;
  if (col >= cols) return;
  const int64_t stride = code_bytes(Format::nf4, cols), blocks = num_blocks(Format::nf4, cols);
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_rows; first += int64_t{gridDim.y} * kRows) {
    uint32_t packed[kRows] = {};
    float scale[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= num_rows) continue;
      const int64_t source = row_index ? row_index[first + r] : first + r;
      packed[r] = load_nf4<T>(codes + source * stride + col / 2);
      scale[r] = absmax[source * blocks + col / kBlockSize];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= num_rows) continue;
      const int64_t target = out_index ? out_index[first + r] : first + r;
      float value[L::kPack];
#pragma unroll
      for (int i = 0; i < L::kPack; ++i) value[i] = table[packed[r] >> nf4_shift(i) & 15u] * scale[r];
      Pack pack;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          pack.word[i] = float_bits(value[i]);
        } else {
          pack.word[i] = bf16_pair(value[2 * i], value[2 * i + 1]);
        }
      }
      store_weights<kAligned>(out + target * out_stride, col, cols, pack);
    }
  }
}

// bf16 codes are bf16 weights in rows padded to 16 bytes, so a pack's codes are always whole.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    encode_bf16_kernel(const T* __restrict__ weight, uint8_t* __restrict__ codes, const int64_t* __restrict__ row_index,
                       int64_t num_rows, int64_t cols, int64_t weight_stride) {
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * Layout<T>::kPack;
  const int64_t stride = code_bytes(Format::bf16, cols);
  if (2 * col >= stride) return;
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_rows; first += int64_t{gridDim.y} * kRows) {
    Pack pack[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r < num_rows) pack[r] = load_weights<kAligned>(weight + (first + r) * weight_stride, col, cols);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= num_rows) continue;
      uint8_t* target = codes + (row_index ? row_index[first + r] : first + r) * stride + 2 * col;
      const auto& word = pack[r].word;
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<uint2*>(target) = make_uint2(bf16_pair(bits_float(word[0]), bits_float(word[1])),
                                                       bf16_pair(bits_float(word[2]), bits_float(word[3])));
      } else {
        store_wide(target, pack[r]);
      }
    }
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    decode_bf16_kernel(const uint8_t* __restrict__ codes, T* __restrict__ out, const int64_t* __restrict__ row_index,
                       const int64_t* __restrict__ out_index, int64_t num_rows, int64_t cols, int64_t out_stride) {
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * Layout<T>::kPack;
  if (col >= cols) return;
  const int64_t stride = code_bytes(Format::bf16, cols);
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_rows; first += int64_t{gridDim.y} * kRows) {
    Pack pack[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= num_rows) continue;
      const uint8_t* source = codes + (row_index ? row_index[first + r] : first + r) * stride + 2 * col;
      if constexpr (sizeof(T) == 4) {
        const uint2 half = *reinterpret_cast<const uint2*>(source);
        pack[r] = {{half.x << 16, half.x & 0xffff0000u, half.y << 16, half.y & 0xffff0000u}};
      } else {
        pack[r] = load_wide(source);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= num_rows) continue;
      const int64_t target = out_index ? out_index[first + r] : first + r;
      store_weights<kAligned>(out + target * out_stride, col, cols, pack[r]);
    }
  }
}

struct LaunchShape {
  dim3 grid, block;
};

LaunchShape launch_shape(int64_t num_rows, int64_t packs) {
  int threads = kMinThreads;
  while (threads < kMaxThreads && threads < packs) threads *= 2;
  const int64_t grid_x = (packs + threads - 1) / threads, grid_y = (num_rows + kRows - 1) / kRows;
  if (grid_x > kMaxGridX) throw std::invalid_argument("cols: a row is too long for the GPU codec");
  return {dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(std::min(grid_y, kMaxGridY))),
          dim3(static_cast<unsigned>(threads))};
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

template <class T, bool kAligned>
void launch_encode(const EncodeRowsArgs& a, void* stream) {
  // Every byte of the codes is written, so the padding counts as weights.
  const int64_t bytes = code_bytes(a.format, a.cols);
  const int64_t padded = a.format == Format::nf4 ? 2 * bytes : bytes / 2;
  const LaunchShape shape = launch_shape(a.num_rows, (padded + Layout<T>::kPack - 1) / Layout<T>::kPack);
  const T* weight = static_cast<const T*>(a.weight);
  if (a.format == Format::nf4) {
    launch("encode_rows", encode_nf4_kernel<T, kAligned>, shape.grid, shape.block, stream, weight, a.codes,
           static_cast<float*>(a.absmax), a.row_index, a.num_rows, a.cols, a.weight_stride);
  } else {
    launch("encode_rows", encode_bf16_kernel<T, kAligned>, shape.grid, shape.block, stream, weight, a.codes,
           a.row_index, a.num_rows, a.cols, a.weight_stride);
  }
}

template <class T, bool kAligned>
void launch_decode(const DecodeRowsArgs& a, void* stream) {
  const LaunchShape shape = launch_shape(a.num_rows, (a.cols + Layout<T>::kPack - 1) / Layout<T>::kPack);
  T* out = static_cast<T*>(a.out);
  if (a.format == Format::nf4) {
    launch("decode_rows", decode_nf4_kernel<T, kAligned>, shape.grid, shape.block, stream, a.codes,
           static_cast<const float*>(a.absmax), out, a.row_index, a.out_index, a.num_rows, a.cols, a.out_stride);
  } else {
    launch("decode_rows", decode_bf16_kernel<T, kAligned>, shape.grid, shape.block, stream, a.codes, out, a.row_index,
           a.out_index, a.num_rows, a.cols, a.out_stride);
  }
}

}  // namespace

void encode_rows(const EncodeRowsArgs& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  check_codes(args.codes);
  check_supported(args.format, args.weight_dtype);
  const bool wide = aligned(args.weight, args.weight_stride * element_size(args.weight_dtype));
  if (args.weight_dtype == DType::f32) {
    wide ? launch_encode<float, true>(args, stream) : launch_encode<float, false>(args, stream);
  } else {
    wide ? launch_encode<Bf16, true>(args, stream) : launch_encode<Bf16, false>(args, stream);
  }
}

void decode_rows(const DecodeRowsArgs& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  check_codes(args.codes);
  check_supported(args.format, args.out_dtype);
  const bool wide = aligned(args.out, args.out_stride * element_size(args.out_dtype));
  if (args.out_dtype == DType::f32) {
    wide ? launch_decode<float, true>(args, stream) : launch_decode<float, false>(args, stream);
  } else {
    wide ? launch_decode<Bf16, true>(args, stream) : launch_decode<Bf16, false>(args, stream);
  }
}

}  // namespace usaf::gpu

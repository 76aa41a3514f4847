// The weight codec on AMD GPUs: rows of fp32, bf16 or fp16 to and from the formats of numerics/formats.h.
//
// Written for RDNA2 (wave32), right on any wave size. A workgroup lies along one row and works on four rows; which rows
// is uniform over the workgroup, so row lists and row addresses are scalar work (SALU, s_load) and the vector unit only
// sees weights. Each lane starts its loads of all four rows before it uses the first, 16 bytes of weights at a time
// (4 fp32 or 8 of 16 bits: a "pack"), whose codes are 2 to 16 bytes. Decoding NF4 reads a 16-entry LDS table, whose
// entries lie in 16 banks: no conflicts. A block's absmax is found among its 16 or 8 neighbouring lanes.
// Bytes moved: per weight its own 2 or 4, and code_bytes + scale_bytes * num_blocks per row; the codec is
// bandwidth-bound.
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

constexpr int kRows = 4;  // rows of a workgroup, all in flight

// The codes of a pack: the first kBytes bytes of the words.
template <Format kFormat, class T>
struct PackCodes {
  static constexpr int kBits = static_cast<int>(code_bits(kFormat));
  static constexpr int kBytes = Layout<T>::kPack * kBits / 8;

  __device__ static constexpr int word(int i) { return i * kBits / 32; }
  __device__ static constexpr int shift(int i) { return is_nf4(kFormat) ? nf4_shift(i) : i * kBits % 32; }

  __device__ __forceinline__ static Pack load(const uint8_t* __restrict__ source) {
    if constexpr (kBytes == 2) {
      return {{*reinterpret_cast<const uint16_t*>(source)}};
    } else if constexpr (kBytes == 4) {
      return {{*reinterpret_cast<const uint32_t*>(source)}};
    } else if constexpr (kBytes == 8) {
      const uint2 half = *reinterpret_cast<const uint2*>(source);
      return {{half.x, half.y}};
    } else {
      return load_wide(source);
    }
  }
  __device__ __forceinline__ static void store(uint8_t* __restrict__ target, const Pack& codes) {
    if constexpr (kBytes == 2) {
      *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(codes.word[0]);
    } else if constexpr (kBytes == 4) {
      *reinterpret_cast<uint32_t*>(target) = codes.word[0];
    } else if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(target) = make_uint2(codes.word[0], codes.word[1]);
    } else {
      store_wide(target, codes);
    }
  }
};

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

template <Format kFormat>
__device__ __forceinline__ uint32_t code_of(float weight, float inverse, const Nf4Lookup<64>& nf4) {
  if constexpr (kFormat == Format::bf16) {
    return to_bf16(weight).bits;
  } else if constexpr (is_nf4(kFormat)) {
    return nf4_encode(nf4, weight * inverse);
  } else {
    return BlockCodec<kFormat>::encode(weight * inverse);
  }
}

template <bool kWide, Format kFormat, class T>
__global__ void __launch_bounds__(kMaxThreads)
    encode_kernel(const T* __restrict__ weight, uint8_t* __restrict__ codes,
                  typename ScaleOf<kFormat>::type* __restrict__ absmax, const int64_t* __restrict__ row_index,
                  int64_t num_rows, int64_t cols, int64_t weight_stride) {
  using L = Layout<T>;
  using C = PackCodes<kFormat, T>;
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * L::kPack;
  const int64_t stride = code_bytes(kFormat, cols), blocks = num_blocks(kFormat, cols);
  const int64_t start = col * C::kBits / 8;
  __shared__ Nf4Lookup<64> nf4;
  if constexpr (is_nf4(kFormat)) {
    copy_table(nf4, kNf4.lookup, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
    __syncthreads();
  }
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_rows; first += int64_t{gridDim.y} * kRows) {
    Pack pack[kRows] = {};
    if (col < cols) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        pack[r] = load_weights<kWide>(weight + row_or_last(first + r, num_rows) * weight_stride, col, cols);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float inverse = 1.0f;
      [[maybe_unused]] typename ScaleOf<kFormat>::type scale = {};
      if constexpr (kFormat != Format::bf16) {
        scale = BlockCodec<kFormat>::make_scale(bits_float(block_magnitude<T>(pack[r])));
        inverse = inverse_step(BlockCodec<kFormat>::step(scale));
      }
      if (first + r >= num_rows) continue;
      const int64_t target = row_index ? row_index[first + r] : first + r;
      Pack packed = {};
      if constexpr (kFormat == Format::bf16 && std::is_same_v<T, Bf16>) {
        packed = pack[r];
      } else {
#pragma unroll
        for (int i = 0; i < L::kPack; ++i) {
          const uint32_t code = code_of<kFormat>(weight_of<T>(pack[r], i), inverse, nf4);
          packed.word[C::word(i)] |= (col + i < cols ? code : 0u) << C::shift(i);
        }
      }
      if (start < stride) C::store(codes + target * stride + start, packed);
      if constexpr (kFormat != Format::bf16) {
        if (col < cols && threadIdx.x % L::kLanes == 0) absmax[target * blocks + col / kBlockSize] = scale;
      }
    }
  }
}

// `table`: the values of NF4.
template <Format kFormat, class T>
__device__ __forceinline__ Pack decode_pack(const Pack& codes, float step, const float* table) {
  using C = PackCodes<kFormat, T>;
  if constexpr (kFormat == Format::bf16 && std::is_same_v<T, Bf16>) {
    return codes;
  } else {
    float value[Layout<T>::kPack];
#pragma unroll
    for (int i = 0; i < Layout<T>::kPack; ++i) {
      const uint32_t bits = codes.word[C::word(i)] >> C::shift(i);
      if constexpr (kFormat == Format::bf16) {
        value[i] = to_float(Bf16{static_cast<uint16_t>(bits)});
      } else if constexpr (is_nf4(kFormat)) {
        value[i] = table[bits & 15u] * step;
      } else {
        value[i] = BlockCodec<kFormat>::value(bits & 255u) * step;
      }
    }
    Pack pack;
#pragma unroll
    for (int i = 0; i < 4; ++i) pack.word[i] = packed_word<T>(value, i);
    return pack;
  }
}

template <bool kWide, Format kFormat, class T>
__global__ void __launch_bounds__(kMaxThreads)
    decode_kernel(const uint8_t* __restrict__ codes, const typename ScaleOf<kFormat>::type* __restrict__ absmax,
                  T* __restrict__ out, const int64_t* __restrict__ row_index, const int64_t* __restrict__ out_index,
                  int64_t num_rows, int64_t cols, int64_t out_stride) {
  using L = Layout<T>;
  using C = PackCodes<kFormat, T>;
  __shared__ float table[16];
  if constexpr (is_nf4(kFormat)) {
    if (threadIdx.x < 16) table[threadIdx.x] = kNf4.value[threadIdx.x];
    __syncthreads();
  }
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * L::kPack;
  if (col >= cols) return;
  const int64_t stride = code_bytes(kFormat, cols), blocks = num_blocks(kFormat, cols);
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_rows; first += int64_t{gridDim.y} * kRows) {
    int64_t source[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) source[r] = row_or_last(first + r, num_rows);
    if (row_index) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) source[r] = row_index[source[r]];
    }
    Pack packed[kRows];
    typename ScaleOf<kFormat>::type scale[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      packed[r] = C::load(codes + source[r] * stride + col * C::kBits / 8);
      if constexpr (kFormat != Format::bf16) scale[r] = absmax[source[r] * blocks + col / kBlockSize];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= num_rows) continue;
      float step = 1.0f;
      if constexpr (kFormat != Format::bf16) step = BlockCodec<kFormat>::step(scale[r]);
      const int64_t target = out_index ? out_index[first + r] : first + r;
      store_weights<kWide>(out + target * out_stride, col, cols, decode_pack<kFormat, T>(packed[r], step, table));
    }
  }
}

template <Format kFormat, class T>
void launch_encode(const EncodeRowsArgs& a, void* stream) {
  // Every byte of the codes is written, so the padding counts as weights.
  const int64_t padded = code_bytes(kFormat, a.cols) * 8 / code_bits(kFormat);
  const LaunchShape shape = launch_shape(kRows, a.num_rows, (padded + Layout<T>::kPack - 1) / Layout<T>::kPack);
  const bool wide = aligned(a.weight, a.weight_stride * int64_t{sizeof(T)}) && a.cols % Layout<T>::kPack == 0;
  with_wide(wide, [&]<bool kWide>() {
    launch("encode_rows", encode_kernel<kWide, kFormat, T>, shape.grid, shape.block, stream,
           static_cast<const T*>(a.weight), a.codes, static_cast<typename ScaleOf<kFormat>::type*>(a.absmax),
           a.row_index, a.num_rows, a.cols, a.weight_stride);
  });
}

template <Format kFormat, class T>
void launch_decode(const DecodeRowsArgs& a, void* stream) {
  const LaunchShape shape = launch_shape(kRows, a.num_rows, (a.cols + Layout<T>::kPack - 1) / Layout<T>::kPack);
  const bool wide = aligned(a.out, a.out_stride * int64_t{sizeof(T)}) && a.cols % Layout<T>::kPack == 0;
  with_wide(wide, [&]<bool kWide>() {
    launch("decode_rows", decode_kernel<kWide, kFormat, T>, shape.grid, shape.block, stream, a.codes,
           static_cast<const typename ScaleOf<kFormat>::type*>(a.absmax), static_cast<T*>(a.out), a.row_index,
           a.out_index, a.num_rows, a.cols, a.out_stride);
  });
}

}  // namespace

void encode_rows(const EncodeRowsArgs& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  check_codes(args.codes);
  with_format(args.format, [&]<Format kFormat>() {
    switch (args.weight_dtype) {
      case DType::f32:
        return launch_encode<kFormat, float>(args, stream);
      case DType::bf16:
        return launch_encode<kFormat, Bf16>(args, stream);
      case DType::f16:
        return launch_encode<kFormat, F16>(args, stream);
    }
  });
}

void decode_rows(const DecodeRowsArgs& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  check_codes(args.codes);
  with_format(args.format, [&]<Format kFormat>() {
    switch (args.out_dtype) {
      case DType::f32:
        return launch_decode<kFormat, float>(args, stream);
      case DType::bf16:
        return launch_decode<kFormat, Bf16>(args, stream);
      case DType::f16:
        return launch_decode<kFormat, F16>(args, stream);
    }
  });
}

}  // namespace usaf::gpu

// dequantize_residual and quantize_residual on NVIDIA GPUs: formulas in numerics/residual.h, one lane's part in
// numerics/adam_quad.h.
//
// One lane holds four neighbouring weights: 16 bytes of fp32, 4 of residuals, 2 to 8 of codes, each contiguous over the
// warp. A thread block is blockDim.x quads of a row wide and blockDim.y rows high, and each thread starts the loads of
// four rows before it uses the first. NF4's values and gaps lie in shared memory, 16 entries in 16 banks each: no two
// lanes conflict within one. Bytes moved a weight: 4 of fp32, 1 of residual, half a byte to 2 of codes, and the scales.
#include "gpu/alignment.h"
#include "kernel_api.h"
#include "launch.h"
#include "pack.h"
#include "quad.h"
#include "with_format.h"

namespace usaf::gpu {
namespace {

constexpr int kRowsInFlight = 4;

// `values`: residuals to decode, or weights to encode.
template <Format kFormat>
struct Loaded {
  uint4 values;
  QuadCodes<kFormat> codes;
  typename ScaleOf<kFormat>::type scale;
};

template <Format kFormat, bool kDecode>
__device__ __forceinline__ Loaded<kFormat> load(const ResidualArgs& args, int64_t row, int64_t col, int count,
                                                bool wide) {
  Loaded<kFormat> in = {};
  const int64_t element = row * args.cols + col;
  if constexpr (kDecode) {
    in.values = load_four<1>(args.residual + element, count, wide);
  } else {
    in.values = load_four<4>(args.weight + element, count, wide);
  }
  in.codes = load_codes<kFormat>(args.codes + row * code_bytes(kFormat, args.cols) + col * code_bits(kFormat) / 8);
  if constexpr (kFormat != Format::bf16) {
    const auto* scales = static_cast<const typename ScaleOf<kFormat>::type*>(args.absmax);
    in.scale = scales[row * num_blocks(kFormat, args.cols) + col / kBlockSize];
  }
  return in;
}

template <Format kFormat, bool kDecode>
__device__ __forceinline__ void finish(const Loaded<kFormat>& in, const ResidualArgs& args, const Nf4Tables& tables,
                                       int64_t element, int count, bool wide) {
  float weight[kQuad], step = 1.0f;
  if constexpr (kFormat != Format::bf16) step = BlockCodec<kFormat>::step(in.scale);
  if constexpr (kDecode) {
    decode_quad<kFormat, AdamMode::residual>(in.codes, in.values.x, step, tables, weight);
    store_four<4>(args.weight + element, repack(weight, float{}), count, wide);
  } else {
    unpack(in.values, weight, float{});
    const uint32_t residuals = encode_residual_quad<kFormat>(weight, in.codes, step, tables);
    store_four<1>(args.residual + element, make_uint4(residuals, 0, 0, 0), count, wide);
  }
}

template <Format kFormat, bool kDecode>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) residual_kernel(ResidualArgs args, bool wide) {
  __shared__ Nf4Tables tables;
  if constexpr (is_nf4(kFormat)) {
    copy_table(tables, kNf4, threadIdx.y * blockDim.x + threadIdx.x, kThreads);
    __syncthreads();
  }
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kQuad;
  if (col >= args.cols) return;
  const int count = quad_count(col, args.cols);
  const int64_t block_rows = int64_t{blockDim.y} * kRowsInFlight;
  for (int64_t first = blockIdx.y * block_rows; first < args.num_rows; first += gridDim.y * block_rows) {
    Loaded<kFormat> in[kRowsInFlight];
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int64_t row = first + j * blockDim.y + threadIdx.y;
      if (row < args.num_rows) in[j] = load<kFormat, kDecode>(args, row, col, count, wide);
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int64_t row = first + j * blockDim.y + threadIdx.y;
      if (row < args.num_rows) finish<kFormat, kDecode>(in[j], args, tables, row * args.cols + col, count, wide);
    }
  }
}

template <bool kDecode>
void launch_residual(const char* name, const ResidualArgs& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  check_codes(args.codes);
  const bool wide = args.cols % kQuad == 0 && is_multiple(args.weight, 16) && is_multiple(args.residual, kQuad);
  const LaunchShape shape = launch_shape(kRowsInFlight, args.num_rows, (args.cols + kQuad - 1) / kQuad);
  with_format(args.format, [&]<Format kFormat>() {
    launch(name, residual_kernel<kFormat, kDecode>, shape.grid, shape.block, stream, args, wide);
  });
}

}  // namespace

void decode_residual(const ResidualArgs& args, void* stream) { launch_residual<true>("decode_residual", args, stream); }

void encode_residual(const ResidualArgs& args, void* stream) {
  launch_residual<false>("encode_residual", args, stream);
}

}  // namespace usaf::gpu

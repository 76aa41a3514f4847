// dequantize_residual and quantize_residual on AMD GPUs: formulas in numerics/residual.h, one lane's part in
// numerics/adam_quad.h.
//
// Written for RDNA2 (wave32), right on any wave size. A workgroup lies along one row and works on four, so that row
// addresses are scalar work; a lane holds four neighbouring weights of each (16 bytes of fp32, 4 of residuals, 2 to 8
// of codes, contiguous over the wave) and starts all loads before it uses the first. NF4's values and gaps lie in LDS,
// 16 entries in 16 banks each: no conflicts. Bytes moved a weight: 4 of fp32, 1 of residual, half a byte to 2 of codes,
// and the scales.
#include "gpu/alignment.h"
#include "kernel_api.h"
#include "launch.h"
#include "pack.h"
#include "quad.h"
#include "with_format.h"

namespace usaf::gpu {
namespace {

constexpr int kRows = 4;  // rows of a workgroup, all in flight

// `source`: residuals to decode, or weights to encode; `target`: the other.
template <bool kWide, Format kFormat, bool kDecode>
__global__ void __launch_bounds__(kMaxThreads)
    residual_kernel(const uint8_t* __restrict__ codes, const typename ScaleOf<kFormat>::type* __restrict__ absmax,
                    const uint8_t* __restrict__ source, uint8_t* __restrict__ target, int64_t num_rows, int64_t cols) {
  constexpr int kSourceBytes = kDecode ? 1 : 4, kTargetBytes = 5 - kSourceBytes;
  __shared__ Nf4Tables tables;
  if constexpr (is_nf4(kFormat)) {
    copy_table(tables, kNf4, threadIdx.x, blockDim.x);
    __syncthreads();
  }
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kQuad;
  if (col >= cols) return;
  const int count = quad_count(col, cols);
  const int64_t stride = code_bytes(kFormat, cols), blocks = num_blocks(kFormat, cols);
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_rows; first += int64_t{gridDim.y} * kRows) {
    Pack values[kRows];
    QuadCodes<kFormat> packed[kRows];
    typename ScaleOf<kFormat>::type scale[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = row_or_last(first + r, num_rows);
      values[r] = load_four<kWide, kSourceBytes>(source + (row * cols + col) * kSourceBytes, count);
      packed[r] = load_codes<kFormat>(codes + row * stride + col * code_bits(kFormat) / 8);
      if constexpr (kFormat != Format::bf16) scale[r] = absmax[row * blocks + col / kBlockSize];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r;
      if (row >= num_rows) continue;
      float step = 1.0f, weight[kQuad];
      if constexpr (kFormat != Format::bf16) step = BlockCodec<kFormat>::step(scale[r]);
      Pack out = {};
      if constexpr (kDecode) {
        decode_quad<kFormat, AdamMode::residual>(packed[r], values[r].word[0], step, tables, weight);
        for (int i = 0; i < kQuad; ++i) out.word[i] = float_bits(weight[i]);
      } else {
        for (int i = 0; i < kQuad; ++i) weight[i] = bits_float(values[r].word[i]);
        out.word[0] = encode_residual_quad<kFormat>(weight, packed[r], step, tables);
      }
      store_four<kWide, kTargetBytes>(target + (row * cols + col) * kTargetBytes, out, count);
    }
  }
}

template <bool kDecode>
void launch_residual(const char* name, const ResidualArgs& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  check_codes(args.codes);
  const bool wide = args.cols % kQuad == 0 && is_multiple(args.weight, 16) && is_multiple(args.residual, kQuad);
  const LaunchShape shape = launch_shape(kRows, args.num_rows, (args.cols + kQuad - 1) / kQuad);
  auto *weight = reinterpret_cast<uint8_t*>(args.weight), *residual = reinterpret_cast<uint8_t*>(args.residual);
  with_format(args.format, [&]<Format kFormat>() {
    with_wide(wide, [&]<bool kWide>() {
      launch(name, residual_kernel<kWide, kFormat, kDecode>, shape.grid, shape.block, stream, args.codes,
             static_cast<const typename ScaleOf<kFormat>::type*>(args.absmax), kDecode ? residual : weight,
             kDecode ? weight : residual, args.num_rows, args.cols);
    });
  });
}

}  // namespace

void decode_residual(const ResidualArgs& args, void* stream) { launch_residual<true>("decode_residual", args, stream); }

void encode_residual(const ResidualArgs& args, void* stream) {
  launch_residual<false>("encode_residual", args, stream);
}

}  // namespace usaf::gpu

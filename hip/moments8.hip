// dequantize_moments8 on AMD GPUs: the map of numerics/dynamic8.h.
//
// Written for RDNA2 (wave32), right on any wave size. A workgroup lies along one row and works on four, so that row
// addresses are scalar work; a lane turns four neighbouring codes of each into 16 bytes of fp32, contiguous over the
// wave, and starts all loads before it uses the first. The map's 256 values lie in LDS. Bytes moved a moment: 1 read,
// 4 written, and 4 for each block of 256.
#include "gpu/alignment.h"
#include "kernel_api.h"
#include "launch.h"
#include "pack.h"
#include "quad.h"

namespace usaf::gpu {
namespace {

constexpr int kRows = 4;  // rows of a workgroup, all in flight

__device__ constexpr Dynamic8 kSignedMap = kDynamic8Signed, kUnsignedMap = kDynamic8Unsigned;

template <bool kWide>
__global__ void __launch_bounds__(kMaxThreads)
    decode_moments8_kernel(const uint8_t* __restrict__ codes, const float* __restrict__ absmax,
                           uint8_t* __restrict__ out, int64_t num_rows, int64_t cols, bool is_signed) {
  __shared__ float value[256];
  for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) {
    value[i] = is_signed ? kSignedMap.value[i] : kUnsignedMap.value[i];
  }
  __syncthreads();
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kQuad;
  if (col >= cols) return;
  const int count = quad_count(col, cols);
  const int64_t blocks = num_moment_blocks(cols);
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_rows; first += int64_t{gridDim.y} * kRows) {
    Pack packed[kRows];
    float scale[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = row_or_last(first + r, num_rows);
      packed[r] = load_four<kWide, 1>(codes + row * cols + col, count);
      scale[r] = absmax[row * blocks + col / kMomentBlock];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r;
      if (row >= num_rows) continue;
      float moment[kQuad];
      decode_moments_quad(value, packed[r].word[0], scale[r], moment);
      Pack words;
      for (int i = 0; i < kQuad; ++i) words.word[i] = float_bits(moment[i]);
      store_four<kWide, 4>(out + (row * cols + col) * 4, words, count);
    }
  }
}

}  // namespace

void decode_moments8(const DecodeMoments8Args& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  const bool wide = args.cols % kQuad == 0 && is_multiple(args.codes, kQuad) && is_multiple(args.out, 16);
  const LaunchShape shape = launch_shape(kRows, args.num_rows, (args.cols + kQuad - 1) / kQuad);
  with_wide(wide, [&]<bool kWide>() {
    launch("decode_moments8", decode_moments8_kernel<kWide>, shape.grid, shape.block, stream, args.codes, args.absmax,
           reinterpret_cast<uint8_t*>(args.out), args.num_rows, args.cols, args.is_signed);
  });
}

}  // namespace usaf::gpu

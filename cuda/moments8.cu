// dequantize_moments8 on NVIDIA GPUs: the map of numerics/dynamic8.h.
//
// One lane turns four neighbouring codes into 16 bytes of fp32, contiguous over the warp, and starts the loads of four
// rows before it uses the first. The map's 256 values lie in shared memory. Bytes moved a moment: 1 read, 4 written,
// and 4 for each block of 256.
#include "gpu/alignment.h"
#include "kernel_api.h"
#include "launch.h"
#include "pack.h"
#include "quad.h"

namespace usaf::gpu {
namespace {

constexpr int kRowsInFlight = 4;

__device__ constexpr Dynamic8 kSignedMap = kDynamic8Signed, kUnsignedMap = kDynamic8Unsigned;

__global__ void __launch_bounds__(kThreads, kBlocksPerSm) decode_moments8_kernel(DecodeMoments8Args args, bool wide) {
  __shared__ float value[256];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  static_assert(kThreads == 256);
  value[thread] = args.is_signed ? kSignedMap.value[thread] : kUnsignedMap.value[thread];
  __syncthreads();
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kQuad;
  if (col >= args.cols) return;
  const int count = quad_count(col, args.cols);
  const int64_t blocks = num_moment_blocks(args.cols), block_rows = int64_t{blockDim.y} * kRowsInFlight;
  for (int64_t first = blockIdx.y * block_rows; first < args.num_rows; first += gridDim.y * block_rows) {
    uint32_t codes[kRowsInFlight];
    float absmax[kRowsInFlight];
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int64_t row = first + j * blockDim.y + threadIdx.y;
      if (row >= args.num_rows) continue;
      codes[j] = load_four<1>(args.codes + row * args.cols + col, count, wide).x;
      absmax[j] = __ldg(args.absmax + row * blocks + col / kMomentBlock);
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int64_t row = first + j * blockDim.y + threadIdx.y;
      if (row >= args.num_rows) continue;
      float moment[kQuad];
      decode_moments_quad(value, codes[j], absmax[j], moment);
      store_four<4>(args.out + row * args.cols + col, repack(moment, float{}), count, wide);
    }
  }
}

}  // namespace

void decode_moments8(const DecodeMoments8Args& args, void* stream) {
  if (args.num_rows == 0 || args.cols == 0) return;
  const bool wide = args.cols % kQuad == 0 && is_multiple(args.codes, kQuad) && is_multiple(args.out, 16);
  const LaunchShape shape = launch_shape(kRowsInFlight, args.num_rows, (args.cols + kQuad - 1) / kQuad);
  launch("decode_moments8", decode_moments8_kernel, shape.grid, shape.block, stream, args, wide);
}

}  // namespace usaf::gpu

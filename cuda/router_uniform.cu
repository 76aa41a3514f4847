// Noise of the routers on NVIDIA GPUs: a thread draws a Philox group of four numbers (numerics/rng.h) and writes them
// at once. Bytes: 4 a number, written.
#include <algorithm>

#include "kernel_api.h"
#include "launch.h"
#include "numerics/rng.h"
#include "pack.h"

namespace usaf::gpu {
namespace {

static_assert(kRandomsPerGroup == kPack<float>, "a group is one 16-byte access");

__global__ void __launch_bounds__(kThreads, kBlocksPerSm) router_uniform_kernel(RouterUniformArgs args, bool aligned) {
  const int64_t groups = (args.num_experts + kRandomsPerGroup - 1) / kRandomsPerGroup;
  const int64_t group = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (group >= groups) return;
  for (int64_t token = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; token < args.num_tokens;
       token += int64_t{gridDim.y} * blockDim.y) {
    const Random4 random = router_random_group(args.seed, args.step, args.micro_batch, args.layer,
                                               static_cast<uint32_t>(token * groups + group));
    float value[kRandomsPerGroup];
#pragma unroll
    for (int i = 0; i < kRandomsPerGroup; ++i) value[i] = to_open_uniform(random.value[i]);
    store_pack(args.out + token * args.num_experts, group * kRandomsPerGroup, args.num_experts, aligned,
               repack(value, float{}));
  }
}

}  // namespace

void router_uniform(const RouterUniformArgs& args, void* stream) {
  if (args.num_tokens == 0 || args.num_experts == 0) return;
  const LaunchShape shape =
      launch_shape(1, args.num_tokens, (args.num_experts + kRandomsPerGroup - 1) / kRandomsPerGroup);
  launch("router_uniform", router_uniform_kernel, shape.grid, shape.block, stream, args,
         aligned(args.out, args.num_experts * 4));
}

}  // namespace usaf::gpu

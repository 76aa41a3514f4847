// Noise of the routers on AMD GPUs: a lane draws a Philox group of four numbers (numerics/rng.h) and writes them at
// once. A workgroup lies along a token's row, so the token's part of the counter is scalar work; a row of few experts
// shares its wave with no other. Bytes: 4 a number, written.
#include <algorithm>

#include "kernel_api.h"
#include "launch.h"
#include "numerics/rng.h"
#include "pack.h"

namespace usaf::gpu {
namespace {

static_assert(kRandomsPerGroup == Layout<float>::kPack, "a group is one 16-byte access");

template <bool kWide>
__global__ void __launch_bounds__(kMaxThreads)
    router_uniform_kernel(float* __restrict__ out, int64_t num_tokens, int64_t num_experts, uint64_t seed, int32_t step,
                          int32_t micro_batch, int32_t layer) {
  const int64_t groups = (num_experts + kRandomsPerGroup - 1) / kRandomsPerGroup;
  const int64_t group = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (group >= groups) return;
  for (int64_t token = blockIdx.y; token < num_tokens; token += gridDim.y) {
    const Random4 random =
        router_random_group(seed, step, micro_batch, layer, static_cast<uint32_t>(token * groups + group));
    Pack pack;
#pragma unroll
    for (int i = 0; i < kRandomsPerGroup; ++i) pack.word[i] = float_bits(to_open_uniform(random.value[i]));
    store_weights<kWide>(out + token * num_experts, group * kRandomsPerGroup, num_experts, pack);
  }
}

}  // namespace

void router_uniform(const RouterUniformArgs& a, void* stream) {
  if (a.num_tokens == 0 || a.num_experts == 0) return;
  const LaunchShape shape = launch_shape(1, a.num_tokens, (a.num_experts + kRandomsPerGroup - 1) / kRandomsPerGroup);
  with_wide(aligned(a.out, a.num_experts * 4), [&]<bool kWide>() {
    launch("router_uniform", router_uniform_kernel<kWide>, shape.grid, shape.block, stream, a.out, a.num_tokens,
           a.num_experts, a.seed, a.step, a.micro_batch, a.layer);
  });
}

}  // namespace usaf::gpu

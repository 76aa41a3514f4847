// Noise of the routers: each token's row from its own Philox groups, so the bits do not depend on threads or batch
// size.
#include <algorithm>

#include "../kernel_api.h"
#include "../numerics/rng.h"
#include "parallel.h"

namespace usaf::cpu {

void router_uniform(const RouterUniformArgs& args, void*) {
  const int64_t groups = (args.num_experts + kRandomsPerGroup - 1) / kRandomsPerGroup;
  parallel_for(args.num_tokens, args.num_experts, [&](int64_t token) {
    float* row = args.out + token * args.num_experts;
    for (int64_t g = 0; g < groups; ++g) {
      const Random4 random = router_random_group(args.seed, args.step, args.micro_batch, args.layer,
                                                 static_cast<uint32_t>(token * groups + g));
      const int64_t first = g * kRandomsPerGroup;
      const int64_t count = std::min<int64_t>(kRandomsPerGroup, args.num_experts - first);
      for (int64_t i = 0; i < count; ++i) row[first + i] = to_open_uniform(random.value[i]);
    }
  });
}

}  // namespace usaf::cpu

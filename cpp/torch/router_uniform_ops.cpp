// router_uniform_.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>

#include "../numerics/rng.h"
#include "backend.h"
#include "checks.h"

namespace usaf {
namespace {

int32_t check_counter(int64_t value, const char* name) {
  TORCH_CHECK_VALUE(value >= 0 && value <= INT32_MAX, name, ": expected 0 <= ", name, " < 2^31, got ", value);
  return static_cast<int32_t>(value);
}

template <class Backend>
void router_uniform_(const at::Tensor& out, int64_t seed, int64_t step, int64_t micro_batch, int64_t layer) {
  check_dim(out, "out", 2);
  check_writable(out, "out", at::kFloat, out.sizes());
  const int64_t num_tokens = out.size(0), num_experts = out.size(1);
  const int64_t groups = (num_experts + kRandomsPerGroup - 1) / kRandomsPerGroup;
  TORCH_CHECK_VALUE(groups == 0 || num_tokens <= (int64_t{1} << 32) / groups,
                    "out: expected num_tokens * num_experts of at most 2^34, got shape ", out.sizes());
  const typename Backend::Guard guard(out);
  Backend::router_uniform(
      {out.mutable_data_ptr<float>(), num_tokens, num_experts, static_cast<uint64_t>(seed), check_counter(step, "step"),
       check_counter(micro_batch, "micro_batch"), check_counter(layer, "layer")},
      guard.stream());
}

}  // namespace

TORCH_LIBRARY_IMPL(usaf, CPU, m) { m.impl("router_uniform_", &router_uniform_<CpuBackend>); }
#ifdef USAF_WITH_GPU
TORCH_LIBRARY_IMPL(usaf, USAF_GPU_KEY, m) { m.impl("router_uniform_", &router_uniform_<GpuBackend>); }
#endif

}  // namespace usaf

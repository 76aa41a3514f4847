// expert_gather, expert_scatter, expert_scatter_backward.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "backend.h"
#include "checks.h"

namespace usaf {
namespace {

using at::Tensor;

// int32 scratch of the GPU kernels; undefined for the CPU, whose kernels take null.
template <class Backend>
Tensor scratch(int64_t count, const Tensor& like) {
  return Backend::kHostMemory ? Tensor() : at::empty({count}, like.options().dtype(at::kInt));
}

int32_t* int32_or_null(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr<int32_t>() : nullptr; }

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> expert_gather(const Tensor& x_in, const Tensor& index_in, int64_t num_experts) {
  const DType dtype = check_float(x_in, "x");
  check_dim(x_in, "x", 2);
  check_dim(index_in, "index", 2);
  check_dtype(index_in, "index", at::kLong);
  check_device(index_in, "index", x_in);
  TORCH_CHECK_VALUE(index_in.size(0) == x_in.size(0), "index: expected shape [", x_in.size(0), ", top_k], got ",
                    index_in.sizes());
  TORCH_CHECK_VALUE(index_in.numel() <= INT32_MAX, "index: expected at most 2^31 - 1 pairs, got ", index_in.numel());
  TORCH_CHECK_VALUE(num_experts >= 1, "num_experts: expected at least 1, got ", num_experts);
  const typename Backend::Guard guard(x_in);
  const Tensor x = x_in.contiguous(), index = index_in.contiguous();
  if constexpr (Backend::kHostMemory) check_range<int64_t>(index, "index", 0, num_experts + 1);
  const int64_t num_tokens = x.size(0), top_k = index.size(1), num_rows = index.numel();
  const auto int32 = x.options().dtype(at::kInt);
  Tensor offsets = at::empty({num_experts + 1}, int32), source = at::empty({num_rows}, int32);
  Tensor inverse = at::empty({num_tokens, top_k}, int32), permuted = at::empty({num_rows, x.size(1)}, x.options());
  const Tensor counts = scratch<Backend>(num_sort_chunks(num_rows) * num_experts, x);
  Backend::sort_by_expert(
      {index.const_data_ptr<int64_t>(), offsets.mutable_data_ptr<int32_t>(), source.mutable_data_ptr<int32_t>(),
       inverse.mutable_data_ptr<int32_t>(), int32_or_null(counts), num_tokens, top_k, num_experts},
      guard.stream());
  Backend::permute_rows({x.const_data_ptr(), source.const_data_ptr<int32_t>(), inverse.const_data_ptr<int32_t>(),
                         permuted.mutable_data_ptr(), num_rows, num_tokens, top_k, x.size(1), dtype},
                        guard.stream());
  return {permuted, offsets, inverse};
}

// Checks what scatter and its backward share. weights undefined: all ones.
template <class Backend>
void check_scatter(const Tensor& permuted, const Tensor& inverse, const std::optional<Tensor>& weights) {
  check_float(permuted, "permuted");
  check_dim(permuted, "permuted", 2);
  check_dim(inverse, "inverse", 2);
  check_dtype(inverse, "inverse", at::kInt);
  check_device(inverse, "inverse", permuted);
  if (weights.has_value()) {
    check_float(*weights, "weights");
    check_shape(*weights, "weights", inverse.sizes());
    check_device(*weights, "weights", permuted);
  }
  if constexpr (Backend::kHostMemory) {
    check_range<int32_t>(inverse, "inverse", -1, permuted.size(0));
    std::vector<bool> owned(static_cast<size_t>(permuted.size(0)), false);
    for (int64_t i = 0; i < inverse.numel(); ++i) {
      const int32_t p = inverse.const_data_ptr<int32_t>()[i];
      if (p < 0) continue;
      TORCH_CHECK_VALUE(!owned[static_cast<size_t>(p)], "inverse: expected distinct rows, got ", p, " twice");
      owned[static_cast<size_t>(p)] = true;
    }
  }
}

template <class Backend>
Tensor expert_scatter(const Tensor& permuted_in, const Tensor& inverse_in, const std::optional<Tensor>& weights_in) {
  const typename Backend::Guard guard(permuted_in);
  const Tensor permuted = permuted_in.contiguous(), inverse = inverse_in.contiguous();
  check_scatter<Backend>(permuted, inverse, weights_in);
  const Tensor weights = weights_in.has_value() ? weights_in->contiguous() : Tensor();
  Tensor out = at::empty({inverse.size(0), permuted.size(1)}, permuted.options());
  Backend::combine_rows({permuted.const_data_ptr(), inverse.const_data_ptr<int32_t>(),
                         weights.defined() ? weights.const_data_ptr() : nullptr, out.mutable_data_ptr(),
                         inverse.size(0), inverse.size(1), permuted.size(1), check_float(permuted, "permuted"),
                         weights.defined() ? check_float(weights, "weights") : DType::f32},
                        guard.stream());
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor> expert_scatter_backward(const Tensor& grad_out_in, const Tensor& permuted_in,
                                                   const Tensor& inverse_in, const std::optional<Tensor>& weights_in) {
  const typename Backend::Guard guard(permuted_in);
  const Tensor permuted = permuted_in.contiguous(), inverse = inverse_in.contiguous();
  check_scatter<Backend>(permuted, inverse, weights_in);
  check_dtype(grad_out_in, "grad_out", permuted.scalar_type());
  check_shape(grad_out_in, "grad_out", {inverse.size(0), permuted.size(1)});
  check_device(grad_out_in, "grad_out", permuted);
  const Tensor grad_out = grad_out_in.contiguous();
  const Tensor weights = weights_in.has_value() ? weights_in->contiguous()
                                                : at::ones(inverse.sizes(), permuted.options().dtype(at::kFloat));
  Tensor grad_permuted = at::empty_like(permuted), grad_weights = at::empty_like(weights);
  const Tensor source = scratch<Backend>(permuted.size(0), permuted);
  Backend::combine_rows_backward(
      {grad_out.const_data_ptr(), permuted.const_data_ptr(), inverse.const_data_ptr<int32_t>(),
       weights.const_data_ptr(), grad_permuted.mutable_data_ptr(), grad_weights.mutable_data_ptr(),
       int32_or_null(source), permuted.size(0), inverse.size(0), inverse.size(1), permuted.size(1),
       check_float(permuted, "permuted"), check_float(weights, "weights")},
      guard.stream());
  return {grad_permuted, grad_weights};
}

template <class Backend>
void register_gather(torch::Library& m) {
  m.impl("expert_gather", &expert_gather<Backend>);
  m.impl("expert_scatter", &expert_scatter<Backend>);
  m.impl("expert_scatter_backward", &expert_scatter_backward<Backend>);
}

}  // namespace

TORCH_LIBRARY_IMPL(usaf, CPU, m) { register_gather<CpuBackend>(m); }
#ifdef USAF_WITH_GPU
TORCH_LIBRARY_IMPL(usaf, USAF_GPU_KEY, m) { register_gather<GpuBackend>(m); }
#endif

}  // namespace usaf

// glu, glu_backward.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "backend.h"
#include "checks.h"

namespace usaf {
namespace {

using at::Tensor;

DType check_gate_up(const Tensor& gate_up, const std::optional<Tensor>& bias) {
  const DType dtype = check_float(gate_up, "gate_up");
  TORCH_CHECK_VALUE(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0,
                    "gate_up: expected shape [num_rows, 2 * intermediate_size], got ", gate_up.sizes());
  if (bias.has_value()) {
    check_dtype(*bias, "bias", at::kFloat);
    check_shape(*bias, "bias", {gate_up.size(1)});
    check_device(*bias, "bias", gate_up);
  }
  return dtype;
}

template <class Backend>
Tensor glu(const Tensor& gate_up_in, std::string_view activation_name, bool interleaved,
           const std::optional<Tensor>& bias_in) {
  const Activation activation = checked(parse_activation, activation_name);
  const DType dtype = check_gate_up(gate_up_in, bias_in);
  const typename Backend::Guard guard(gate_up_in);
  const Tensor gate_up = gate_up_in.contiguous(), bias = bias_in.has_value() ? bias_in->contiguous() : Tensor();
  const int64_t num_rows = gate_up.size(0), intermediate_size = gate_up.size(1) / 2;
  Tensor h = at::empty({num_rows, intermediate_size}, gate_up.options());
  Backend::glu({gate_up.const_data_ptr(), bias.defined() ? bias.const_data_ptr<float>() : nullptr, h.mutable_data_ptr(),
                num_rows, intermediate_size, interleaved, activation, dtype},
               guard.stream());
  return h;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> glu_backward(const Tensor& grad_h_in, const Tensor& gate_up_in,
                                                std::string_view activation_name, bool interleaved,
                                                const std::optional<Tensor>& bias_in,
                                                const std::optional<Tensor>& row_weight_in) {
  const Activation activation = checked(parse_activation, activation_name);
  const DType dtype = check_gate_up(gate_up_in, bias_in);
  const int64_t num_rows = gate_up_in.size(0), intermediate_size = gate_up_in.size(1) / 2;
  check_dtype(grad_h_in, "grad_h", gate_up_in.scalar_type());
  check_shape(grad_h_in, "grad_h", {num_rows, intermediate_size});
  check_device(grad_h_in, "grad_h", gate_up_in);
  if (row_weight_in.has_value()) {
    check_dtype(*row_weight_in, "row_weight", at::kFloat);
    check_shape(*row_weight_in, "row_weight", {num_rows});
    check_device(*row_weight_in, "row_weight", gate_up_in);
  }
  const typename Backend::Guard guard(gate_up_in);
  const Tensor grad_h = grad_h_in.contiguous(), gate_up = gate_up_in.contiguous();
  const Tensor bias = bias_in.has_value() ? bias_in->contiguous() : Tensor();
  const Tensor row_weight = row_weight_in.has_value() ? row_weight_in->contiguous() : Tensor();
  Tensor grad_gate_up = at::empty_like(gate_up), weighted_h = at::empty_like(grad_h);
  Tensor grad_row_weight = at::empty({num_rows}, gate_up.options().dtype(at::kFloat));
  Backend::glu_backward(
      {grad_h.const_data_ptr(), gate_up.const_data_ptr(), bias.defined() ? bias.const_data_ptr<float>() : nullptr,
       row_weight.defined() ? row_weight.const_data_ptr<float>() : nullptr, grad_gate_up.mutable_data_ptr(),
       weighted_h.mutable_data_ptr(), grad_row_weight.mutable_data_ptr<float>(), num_rows, intermediate_size,
       interleaved, activation, dtype},
      guard.stream());
  return {grad_gate_up, weighted_h, grad_row_weight};
}

template <class Backend>
void register_glu(torch::Library& m) {
  m.impl("glu", &glu<Backend>);
  m.impl("glu_backward", &glu_backward<Backend>);
}

}  // namespace

TORCH_LIBRARY_IMPL(usaf, CPU, m) { register_glu<CpuBackend>(m); }
#ifdef USAF_WITH_GPU
TORCH_LIBRARY_IMPL(usaf, USAF_GPU_KEY, m) { register_glu<GpuBackend>(m); }
#endif

}  // namespace usaf

// row_gradient_, row_importance_.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

#include "backend.h"
#include "checks.h"

namespace usaf {
namespace {

using at::Tensor;

// The four activations and the experts' offsets, which both ops take.
template <class Backend>
struct Operands {
  Tensor x, grad_out, grad_gate_up, weighted_h, offsets;
  DType dtype;
  int64_t num_experts, hidden_size, intermediate_size;

  Operands(const Tensor& x_in, const Tensor& grad_out_in, const Tensor& grad_gate_up_in, const Tensor& weighted_h_in,
           const Tensor& offsets_in)
      : x(x_in.contiguous()),
        grad_out(grad_out_in.contiguous()),
        grad_gate_up(grad_gate_up_in.contiguous()),
        weighted_h(weighted_h_in.contiguous()),
        offsets(offsets_in.contiguous()),
        dtype(check_float(x, "x")) {
    check_dim(x, "x", 2);
    check_dim(weighted_h, "weighted_h", 2);
    const int64_t num_rows = x.size(0);
    hidden_size = x.size(1);
    intermediate_size = weighted_h.size(1);
    check_operand(grad_out, "grad_out", {num_rows, hidden_size});
    check_operand(grad_gate_up, "grad_gate_up", {num_rows, 2 * intermediate_size});
    check_operand(weighted_h, "weighted_h", {num_rows, intermediate_size});
    check_dim(offsets, "offsets", 1);
    check_dtype(offsets, "offsets", at::kInt);
    check_device(offsets, "offsets", x);
    TORCH_CHECK_VALUE(offsets.numel() >= 1, "offsets: expected num_experts + 1 values, got none");
    num_experts = offsets.numel() - 1;
    if constexpr (Backend::kHostMemory) {
      check_ascending<int32_t>(offsets, "offsets");
      const int32_t* values = offsets.const_data_ptr<int32_t>();
      const int64_t used = int64_t{values[num_experts]} - values[0];
      TORCH_CHECK_VALUE(used <= num_rows, "offsets: expected at most the ", num_rows, " rows of x, got ", used);
    }
  }

  void check_operand(const Tensor& tensor, const char* name, at::IntArrayRef shape) const {
    check_dtype(tensor, name, x.scalar_type());
    check_shape(tensor, name, shape);
    check_device(tensor, name, x);
  }
};

template <class Backend>
void row_gradient_(const Tensor& grad, const Tensor& x, const Tensor& grad_out, const Tensor& grad_gate_up,
                   const Tensor& weighted_h, const Tensor& offsets, const Tensor& neuron_expert_in,
                   const Tensor& neuron_index_in, int64_t first_expert) {
  const typename Backend::Guard guard(x);
  const Operands<Backend> operands(x, grad_out, grad_gate_up, weighted_h, offsets);
  const Tensor neuron_expert = neuron_expert_in.contiguous(), neuron_index = neuron_index_in.contiguous();
  check_dim(neuron_expert, "neuron_expert", 1);
  check_dtype(neuron_expert, "neuron_expert", at::kInt);
  check_dtype(neuron_index, "neuron_index", at::kInt);
  check_shape(neuron_index, "neuron_index", neuron_expert.sizes());
  check_device(neuron_expert, "neuron_expert", x);
  check_device(neuron_index, "neuron_index", x);
  TORCH_CHECK_TYPE(grad.scalar_type() == at::kFloat || grad.scalar_type() == at::kBFloat16,
                   "grad: expected Float or BFloat16, got ", grad.scalar_type());
  check_writable(grad, "grad", grad.scalar_type(), {neuron_expert.size(0), 3, operands.hidden_size});
  check_device(grad, "grad", x);
  TORCH_CHECK_VALUE(first_expert >= 0 && first_expert <= INT32_MAX, "first_expert: expected at least 0, got ",
                    first_expert);
  if constexpr (Backend::kHostMemory) {
    check_range<int32_t>(neuron_expert, "neuron_expert", 0, int64_t{INT32_MAX} + 1);
    check_ascending<int32_t>(neuron_expert, "neuron_expert");
    check_range<int32_t>(neuron_index, "neuron_index", 0, operands.intermediate_size);
  }
  Backend::row_gradient(
      {operands.x.const_data_ptr(), operands.grad_out.const_data_ptr(), operands.grad_gate_up.const_data_ptr(),
       operands.weighted_h.const_data_ptr(), operands.offsets.template const_data_ptr<int32_t>(),
       neuron_expert.const_data_ptr<int32_t>(), neuron_index.const_data_ptr<int32_t>(), grad.mutable_data_ptr(),
       neuron_expert.size(0), first_expert, operands.num_experts, operands.hidden_size, operands.intermediate_size,
       operands.dtype, grad.scalar_type() == at::kFloat ? DType::f32 : DType::bf16},
      guard.stream());
}

template <class Backend>
void row_importance_(const Tensor& importance, const Tensor& x, const Tensor& grad_out, const Tensor& grad_gate_up,
                     const Tensor& weighted_h, const Tensor& offsets, const std::optional<Tensor>& weights_in) {
  const typename Backend::Guard guard(x);
  const Operands<Backend> operands(x, grad_out, grad_gate_up, weighted_h, offsets);
  check_writable(importance, "importance", at::kFloat, {operands.num_experts, operands.intermediate_size});
  check_device(importance, "importance", x);
  const Tensor weights = weights_in ? weights_in->contiguous() : Tensor();
  if (weights_in) {
    operands.check_operand(weights, "weights",
                           {operands.num_experts, 3, operands.intermediate_size, operands.hidden_size});
  }
  Backend::row_importance(
      {operands.x.const_data_ptr(), operands.grad_out.const_data_ptr(), operands.grad_gate_up.const_data_ptr(),
       operands.weighted_h.const_data_ptr(), operands.offsets.template const_data_ptr<int32_t>(),
       weights_in ? weights.const_data_ptr() : nullptr, importance.mutable_data_ptr<float>(), operands.num_experts,
       operands.hidden_size, operands.intermediate_size, operands.dtype},
      guard.stream());
}

template <class Backend>
void register_row_gradient(torch::Library& m) {
  m.impl("row_gradient_", &row_gradient_<Backend>);
  m.impl("row_importance_", &row_importance_<Backend>);
}

}  // namespace

TORCH_LIBRARY_IMPL(usaf, CPU, m) { register_row_gradient<CpuBackend>(m); }
#ifdef USAF_WITH_GPU
TORCH_LIBRARY_IMPL(usaf, USAF_GPU_KEY, m) { register_row_gradient<GpuBackend>(m); }
#endif

}  // namespace usaf

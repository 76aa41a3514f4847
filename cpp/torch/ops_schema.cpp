// The schemas of torch.ops.usaf, all but the expert layer's (expert_ops.cpp). `(a!)` marks what an op changes. Fakes
// and autograd formulas are in python/usaf_ext/ops; ops without a formula refuse to be differentiated.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

TORCH_LIBRARY(usaf, m) {
  m.def("quantize_blocks(Tensor weight, str format) -> (Tensor codes, Tensor absmax)");
  m.def(
      "dequantize_blocks(Tensor codes, Tensor absmax, SymInt cols, str format, ScalarType dtype, Tensor? rows=None) -> "
      "Tensor");
  m.def("quantize_rows_(Tensor(a!) codes, Tensor(b!) absmax, Tensor rows, Tensor weight, str format) -> ()");
  m.def(
      "expert_gather(Tensor x, Tensor index, SymInt num_experts) -> (Tensor permuted, Tensor offsets, Tensor "
      "inverse)");
  m.def("expert_scatter(Tensor permuted, Tensor inverse, Tensor? weights=None) -> Tensor");
  m.def(
      "expert_scatter_backward(Tensor grad_out, Tensor permuted, Tensor inverse, Tensor? weights=None) -> (Tensor "
      "grad_permuted, Tensor grad_weights)");
  m.def("glu(Tensor gate_up, str activation, bool interleaved=False, Tensor? bias=None) -> Tensor");
  m.def(
      "glu_backward(Tensor grad_h, Tensor gate_up, str activation, bool interleaved=False, Tensor? bias=None, Tensor? "
      "row_weight=None) -> (Tensor grad_gate_up, Tensor weighted_h, Tensor grad_row_weight)");
  m.def(
      "row_gradient_(Tensor(a!) grad, Tensor x, Tensor grad_out, Tensor grad_gate_up, Tensor weighted_h, Tensor "
      "offsets, Tensor neuron_expert, Tensor neuron_index, SymInt first_expert=0) -> ()");
  m.def(
      "row_importance_(Tensor(a!) importance, Tensor x, Tensor grad_out, Tensor grad_gate_up, Tensor weighted_h, "
      "Tensor offsets, Tensor? weights=None) -> ()");
  m.def("router_uniform_(Tensor(a!) out, *, int seed, int step, int micro_batch, int layer) -> ()");
  // adam_mode, not mode: torch's tracing passes every argument by name through a function with its own `mode`.
  m.def(
      "masked_adam_(Tensor(a!) codes, Tensor(b!) absmax, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!) step, "
      "Tensor grad, str format, str adam_mode, *, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "Tensor(f!)? master=None, Tensor(g!)? residual=None, Tensor(h!)? exp_avg_absmax=None, Tensor(i!)? "
      "exp_avg_sq_absmax=None, Tensor? active=None, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(j!)? "
      "changed=None, bool stochastic=True, int seed=0, SymInt first_element=0) -> ()");
  m.def("dequantize_residual(Tensor codes, Tensor absmax, Tensor residual, str format) -> Tensor");
  m.def("quantize_residual(Tensor weight, Tensor codes, Tensor absmax, str format) -> Tensor");
  m.def("dequantize_moments8(Tensor codes, Tensor absmax, bool signed) -> Tensor");
}

TORCH_LIBRARY_IMPL(usaf, Autograd, m) {
  for (const char* name : {"quantize_blocks", "dequantize_blocks", "quantize_rows_", "expert_scatter_backward",
                           "glu_backward", "row_gradient_", "row_importance_", "router_uniform_", "masked_adam_",
                           "dequantize_residual", "quantize_residual", "dequantize_moments8"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

// usaf::experts_forward and usaf::experts_backward: one MoE layer's experts in one call.
//
// Experts run in ascending order, each with its own GEMMs (torch's), and add to fp32 outputs in that order: the bits do
// not depend on the budget, on what is resident or on the order in which pages arrive.
//   forward   per expert e with n tokens: X = gather(x); decode W_gate_up; h = glu(X W_gate_up^T); decode W_down^T;
//             y += router weight * (h W_down^T)
//   backward  recompute gate and up; dh = dY W_down; d_weight = <h, dh>; (dg, du) = glu'(w dh); dX += (dg, du)
//   W_gate_up;
//             gradients of the selected rows only
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "expert_layer.h"

namespace torch::autograd {
TORCH_API int get_current_graph_task_id();  // torch/csrc/autograd/graph_task.h, without its includes
}

namespace usaf {
namespace {

using at::Tensor;

at::ScalarType scalar_type(DType dtype) {
  return dtype == DType::f32 ? at::kFloat : dtype == DType::bf16 ? at::kBFloat16 : at::kHalf;
}

bool in_backward() { return torch::autograd::get_current_graph_task_id() != -1; }

ExpertLayer& find_layer(int64_t handle) {
  ExpertLayer* layer = ExpertLayer::find(handle);
  TORCH_CHECK_VALUE(layer != nullptr, "handle: no expert layer has handle ", handle, " (was its module deleted?)");
  return *layer;
}

void check_arguments(const ExpertLayer& layer, const Tensor& x, const Tensor& index, const Tensor& weights) {
  const int64_t hidden_size = layer.layout().hidden_size;
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == hidden_size, "x: expected shape [num_tokens, ", hidden_size, "], got ",
                    x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == scalar_type(layer.dtype()), "x: expected ", scalar_type(layer.dtype()),
                   " (the layer's compute dtype), got ", x.scalar_type());
  TORCH_CHECK_VALUE(index.dim() == 2 && index.size(0) == x.size(0), "index: expected shape [", x.size(0),
                    ", top_k], got ", index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "index: expected int64, got ", index.scalar_type());
  TORCH_CHECK_VALUE(weights.sizes() == index.sizes(), "weights: expected the shape of index ", index.sizes(), ", got ",
                    weights.sizes());
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kFloat || weights.scalar_type() == at::kBFloat16,
                   "weights: expected float32 or bfloat16, got ", weights.scalar_type());
  TORCH_CHECK_VALUE(index.numel() <= INT32_MAX, "index: expected at most 2^31 - 1 (token, slot) pairs");
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] <= layer.num_experts(), "index: expected 0 to ", layer.num_experts(),
                      " (which means 'not here'), got ", values[i], " at position ", i);
  }
}

// The (token, slot) pairs sorted by expert, on the host.
struct Routing {
  Tensor offsets, source, inverse;
  std::vector<int64_t> experts;  // with at least one token, ascending
  int64_t num_tokens, top_k, max_tokens = 0;

  Routing(const Tensor& index, int64_t num_experts)
      : offsets(at::empty({num_experts + 1}, index.options().dtype(at::kInt))),
        source(at::empty({index.numel()}, index.options().dtype(at::kInt))),
        inverse(at::empty(index.sizes(), index.options().dtype(at::kInt))),
        num_tokens(index.size(0)),
        top_k(index.size(1)) {
    cpu::sort_by_expert(
        {index.const_data_ptr<int64_t>(), offsets.mutable_data_ptr<int32_t>(), source.mutable_data_ptr<int32_t>(),
         inverse.mutable_data_ptr<int32_t>(), num_tokens, top_k, num_experts},
        nullptr);
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      const int64_t count = end(expert) - begin(expert);
      max_tokens = std::max(max_tokens, count);
      if (count > 0) experts.push_back(expert);
    }
  }

  int64_t begin(int64_t expert) const { return offsets.const_data_ptr<int32_t>()[expert]; }
  int64_t end(int64_t expert) const { return offsets.const_data_ptr<int32_t>()[expert + 1]; }
  const int32_t* pairs(int64_t expert) const { return source.const_data_ptr<int32_t>() + begin(expert); }
  // So many tokens that practically every expert will be hit.
  bool dense(int64_t num_experts) const { return num_tokens * top_k >= 8 * num_experts; }
};

// Decodes the matrices of one expert into the layer's scratch: page first, then the trained rows over it.
class Decoder {
 public:
  explicit Decoder(ExpertLayer& layer) : layer_(layer), layout_(layer.layout()) {
    options_ = at::TensorOptions().dtype(scalar_type(layer.dtype()));
  }

  // Rows of gate above rows of up: [2 * intermediate_size, hidden_size].
  Tensor gate_up(const uint8_t* page, int64_t expert) {
    decode(page, expert, 0, 2);
    return view(0, 2);
  }

  // W_down^T: [intermediate_size, hidden_size].
  Tensor down(const uint8_t* page, int64_t expert) {
    decode(page, expert, 2, 1);
    return view(2, 1);
  }

 private:
  char* target(int matrix) const {
    return static_cast<char*>(layer_.scratch()) +
           matrix * layout_.intermediate_size * layout_.hidden_size * element_size(layer_.dtype());
  }

  Tensor view(int matrix, int64_t count) const {
    return at::from_blob(target(matrix), {count * layout_.intermediate_size, layout_.hidden_size}, options_);
  }

  // `count` matrices in one launch: as one GEMM reads them, so that each thread decodes what it will read.
  void decode(const uint8_t* page, int64_t expert, int matrix, int count) {
    DecodeRowsArgs args{page + layout_.codes_offset[matrix],
                        page + layout_.absmax_offset[matrix],
                        target(matrix),
                        nullptr,
                        nullptr,
                        count * layout_.intermediate_size,
                        layout_.hidden_size,
                        layout_.hidden_size,
                        layout_.format,
                        layer_.dtype()};
    cpu::decode_rows(args, nullptr);
    const RowBank* bank = layer_.bank.get();
    if (bank == nullptr) return;
    args.codes = bank->pointers().codes;
    args.absmax = bank->pointers().absmax;
    args.out_index = bank->row_targets(expert);
    args.num_rows = bank->first_neuron(expert + 1) - bank->first_neuron(expert);
    for (int overlaid = matrix; overlaid < matrix + count; ++overlaid) {
      args.out = target(overlaid);
      args.row_index = bank->bank_rows(overlaid, expert);
      cpu::decode_rows(args, nullptr);
    }
  }

  ExpertLayer& layer_;
  const PageLayout& layout_;
  at::TensorOptions options_;
};

// Calls `body(page, expert)` for each routed expert in ascending order, with its page in a slot.
template <class Body>
void for_each_expert(ExpertLayer& layer, const Routing& routing, Phase phase, const Body& body) {
  ExpertPager& pager = layer.sweep().pager();
  try {
    const bool dense = routing.dense(layer.num_experts());
    for (auto ticket : layer.sweep().begin(layer.layer(), routing.experts, dense, phase)) {
      pager.wait(ticket, nullptr);
      const std::vector<const uint8_t*> pages = pager.pages(ticket);
      const std::vector<int64_t>& experts = pager.experts_of(ticket);
      for (size_t i = 0; i < experts.size(); ++i) {
        if (routing.end(experts[i]) > routing.begin(experts[i])) body(pages[i], experts[i]);
      }
      pager.release(ticket, nullptr);
    }
  } catch (...) {
    layer.sweep().reset();
    throw;
  }
}

// The first n rows of a buffer that was made for the largest expert.
class RowBuffer {
 public:
  RowBuffer(int64_t max_rows, int64_t cols, at::TensorOptions options)
      : buffer_(at::empty({max_rows, cols}, options)) {}
  Tensor rows(int64_t n) const { return buffer_.narrow(0, 0, n); }

 private:
  Tensor buffer_;
};

void gather(const Tensor& x, const Routing& routing, int64_t expert, const Tensor& out, DType dtype) {
  cpu::gather_rows(
      {x.const_data_ptr(), routing.pairs(expert), out.mutable_data_ptr(), out.size(0), x.size(1), routing.top_k, dtype},
      nullptr);
}

Tensor experts_forward(const Tensor& x_in, const Tensor& index_in, const Tensor& weights_in, const Tensor& /*anchor*/,
                       int64_t handle, bool training) {
  ExpertLayer& layer = find_layer(handle);
  const Tensor x = x_in.contiguous(), index = index_in.contiguous(), weights = weights_in.contiguous();
  check_arguments(layer, x, index, weights);
  const auto [hidden_size, intermediate_size] = std::pair(layer.layout().hidden_size, layer.layout().intermediate_size);
  const DType dtype = layer.dtype();
  const DType weights_dtype = weights.scalar_type() == at::kFloat ? DType::f32 : DType::bf16;
  const Routing routing(index, layer.num_experts());
  if (layer.token_counts != nullptr) {
    for (int64_t e = 0; e < layer.num_experts(); ++e) {
      layer.token_counts[e] = static_cast<int32_t>(routing.end(e) - routing.begin(e));
    }
  }

  Tensor out = at::zeros({x.size(0), hidden_size}, x.options().dtype(at::kFloat));
  const RowBuffer x_buffer(routing.max_tokens, hidden_size, x.options());
  const RowBuffer gate_up_buffer(routing.max_tokens, 2 * intermediate_size, x.options());
  const RowBuffer h_buffer(routing.max_tokens, intermediate_size, x.options());
  const RowBuffer y_buffer(routing.max_tokens, hidden_size, x.options());
  Decoder decoder(layer);
  const Phase phase = in_backward() ? Phase::backward : training ? Phase::training_forward : Phase::inference;
  for_each_expert(layer, routing, phase, [&](const uint8_t* page, int64_t expert) {
    const int64_t n = routing.end(expert) - routing.begin(expert);
    Tensor xe = x_buffer.rows(n), gate_up = gate_up_buffer.rows(n), h = h_buffer.rows(n), y = y_buffer.rows(n);
    gather(x, routing, expert, xe, dtype);
    at::mm_out(gate_up, xe, decoder.gate_up(page, expert).t());
    cpu::glu({gate_up.const_data_ptr(), nullptr, h.mutable_data_ptr(), n, intermediate_size, false, layer.activation(),
              dtype},
             nullptr);
    at::mm_out(y, h, decoder.down(page, expert));
    cpu::scatter_add_rows({y.const_data_ptr(), routing.pairs(expert), weights.const_data_ptr(),
                           out.mutable_data_ptr<float>(), n, hidden_size, routing.top_k, dtype, weights_dtype},
                          nullptr);
  });
  return out.to(x.scalar_type());
}

// Adds the gradients of one expert's selected rows, and the importance of all its rows if it is being measured.
void accumulate_row_gradients(ExpertLayer& layer, int64_t expert, const Tensor& xe, const Tensor& grad_y,
                              const Tensor& grad_gate_up, const Tensor& weighted_h) {
  const auto [hidden_size, intermediate_size] = std::pair(layer.layout().hidden_size, layer.layout().intermediate_size);
  const int32_t offsets[2] = {0, static_cast<int32_t>(xe.size(0))};
  if (const RowBank* bank = layer.bank.get(); bank != nullptr && bank->pointers().grad != nullptr) {
    const BankPointers& rows = bank->pointers();
    const int64_t first = bank->first_neuron(expert);
    if (rows.expert_hit != nullptr) rows.expert_hit[expert] = 1;
    cpu::row_gradient({xe.const_data_ptr(), grad_y.const_data_ptr(), grad_gate_up.const_data_ptr(),
                       weighted_h.const_data_ptr(), offsets, rows.neuron_expert + first, rows.neuron_index + first,
                       rows.grad + first * kMatricesPerExpert * hidden_size, bank->first_neuron(expert + 1) - first,
                       expert, 1, hidden_size, intermediate_size, layer.dtype()},
                      nullptr);
  }
  if (layer.importance != nullptr) {
    cpu::row_importance(
        {xe.const_data_ptr(), grad_y.const_data_ptr(), grad_gate_up.const_data_ptr(), weighted_h.const_data_ptr(),
         offsets, layer.importance + expert * intermediate_size, 1, hidden_size, intermediate_size, layer.dtype()},
        nullptr);
  }
}

double bank_gradient_norm(const ExpertLayer& layer) {
  const RowBank* bank = layer.bank.get();
  if (bank == nullptr || bank->pointers().grad == nullptr || bank->num_neurons() == 0) return 0.0;
  const Tensor grad =
      at::from_blob(bank->pointers().grad, {bank->num_neurons() * kMatricesPerExpert, layer.layout().hidden_size},
                    at::TensorOptions().dtype(at::kFloat));
  // Row by row first: each row by one thread, so that the bits do not depend on the number of threads.
  const Tensor row_norms = at::linalg_vector_norm(grad, 2, {1});
  return at::linalg_vector_norm(row_norms, 2, std::nullopt, false, at::kDouble).item<double>();
}

std::tuple<Tensor, Tensor, Tensor> experts_backward(const Tensor& grad_out_in, const Tensor& x_in,
                                                    const Tensor& index_in, const Tensor& weights_in, int64_t handle) {
  ExpertLayer& layer = find_layer(handle);
  const Tensor grad_out = grad_out_in.contiguous(), x = x_in.contiguous(), index = index_in.contiguous(),
               weights = weights_in.contiguous();
  check_arguments(layer, x, index, weights);
  TORCH_CHECK_VALUE(grad_out.sizes() == x.sizes(), "grad_out: expected the shape of x ", x.sizes(), ", got ",
                    grad_out.sizes());
  TORCH_CHECK_TYPE(grad_out.scalar_type() == x.scalar_type(), "grad_out: expected ", x.scalar_type(), ", got ",
                   grad_out.scalar_type());
  const auto [hidden_size, intermediate_size] = std::pair(layer.layout().hidden_size, layer.layout().intermediate_size);
  const DType dtype = layer.dtype();
  const Routing routing(index, layer.num_experts());
  const double norm_before = bank_gradient_norm(layer);

  const auto f32 = x.options().dtype(at::kFloat);
  const Tensor weights_f32 = weights.to(at::kFloat);
  const float* weight_of = weights_f32.const_data_ptr<float>();
  Tensor grad_x = at::zeros({x.size(0), hidden_size}, f32);
  Tensor grad_weights = at::zeros(weights.sizes(), f32);
  float* grad_weight_of = grad_weights.mutable_data_ptr<float>();
  const RowBuffer x_buffer(routing.max_tokens, hidden_size, x.options());
  const RowBuffer grad_y_buffer(routing.max_tokens, hidden_size, x.options());
  const RowBuffer gate_up_buffer(routing.max_tokens, 2 * intermediate_size, x.options());
  const RowBuffer grad_gate_up_buffer(routing.max_tokens, 2 * intermediate_size, x.options());
  const RowBuffer grad_h_buffer(routing.max_tokens, intermediate_size, x.options());
  const RowBuffer h_buffer(routing.max_tokens, intermediate_size, x.options());
  const RowBuffer grad_xe_buffer(routing.max_tokens, hidden_size, x.options());
  std::vector<float> row_weight(static_cast<size_t>(routing.max_tokens)), grad_row_weight(row_weight.size());
  Decoder decoder(layer);
  for_each_expert(layer, routing, Phase::backward, [&](const uint8_t* page, int64_t expert) {
    const int64_t n = routing.end(expert) - routing.begin(expert);
    const int32_t* pairs = routing.pairs(expert);
    Tensor xe = x_buffer.rows(n), grad_y = grad_y_buffer.rows(n), gate_up = gate_up_buffer.rows(n),
           grad_gate_up = grad_gate_up_buffer.rows(n), grad_h = grad_h_buffer.rows(n), weighted_h = h_buffer.rows(n),
           grad_xe = grad_xe_buffer.rows(n);
    gather(x, routing, expert, xe, dtype);
    gather(grad_out, routing, expert, grad_y, dtype);
    for (int64_t i = 0; i < n; ++i) row_weight[static_cast<size_t>(i)] = weight_of[pairs[i]];
    const Tensor w_gate_up = decoder.gate_up(page, expert);
    at::mm_out(gate_up, xe, w_gate_up.t());
    at::mm_out(grad_h, grad_y, decoder.down(page, expert).t());
    cpu::glu_backward(
        {grad_h.const_data_ptr(), gate_up.const_data_ptr(), nullptr, row_weight.data(), grad_gate_up.mutable_data_ptr(),
         weighted_h.mutable_data_ptr(), grad_row_weight.data(), n, intermediate_size, false, layer.activation(), dtype},
        nullptr);
    for (int64_t i = 0; i < n; ++i) grad_weight_of[pairs[i]] = grad_row_weight[static_cast<size_t>(i)];
    at::mm_out(grad_xe, grad_gate_up, w_gate_up);
    cpu::scatter_add_rows({grad_xe.const_data_ptr(), pairs, nullptr, grad_x.mutable_data_ptr<float>(), n, hidden_size,
                           routing.top_k, dtype, dtype},
                          nullptr);
    accumulate_row_gradients(layer, expert, xe, grad_y, grad_gate_up, weighted_h);
  });

  // The anchor's gradient is the increment of the accumulated norm, so that it sums to the norm over micro-batches.
  Tensor grad_anchor = at::empty({1}, f32);
  grad_anchor.fill_(bank_gradient_norm(layer) - norm_before);
  return {grad_x.to(x.scalar_type()), grad_weights.to(weights.scalar_type()), grad_anchor};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(usaf, m) {
  m.def("experts_forward(Tensor x, Tensor index, Tensor weights, Tensor anchor, int handle, bool training) -> Tensor");
  m.def(
      "experts_backward(Tensor grad_out, Tensor x, Tensor index, Tensor weights, int handle) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(usaf, CPU, m) {
  m.impl("experts_forward", &experts_forward);
  m.impl("experts_backward", &experts_backward);
}

}  // namespace usaf

// The backward of an expert layer: for each expert e with n tokens of a micro-batch
//   X, dY = gather(x, grad_out); recompute gate and up; dh = dY W_down; d_weight = <h, dh>;
//   (dg, du) = glu'(weight * dh); dX += (dg, du) W_gate_up; gradients of the selected rows only
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "backend.h"
#include "expert_batches.h"
#include "expert_decoder.h"
#include "expert_gpu.h"
#include "expert_gradients.h"
#include "expert_ops.h"
#include "expert_panels.h"

namespace usaf {
namespace {

using at::Tensor;

// Through matrices decoded as a whole and torch's mm: any format, dtype and CPU.
class MmBackward {
 public:
  MmBackward(ExpertLayer& layer, const MicroBatches& batches)
      : layer_(layer),
        batches_(batches),
        decoder_(layer),
        x_(buffer(layer.layout().hidden_size)),
        grad_y_(buffer(layer.layout().hidden_size)),
        gate_up_(buffer(2 * layer.layout().intermediate_size)),
        grad_gate_up_(buffer(2 * layer.layout().intermediate_size)),
        grad_h_(buffer(layer.layout().intermediate_size)),
        weighted_h_(buffer(layer.layout().intermediate_size)),
        grad_x_(buffer(layer.layout().hidden_size)),
        row_weight_(static_cast<size_t>(batches.max_tokens())),
        grad_row_weight_(row_weight_.size()) {}

  // Adds to grad_x (fp32 [num_tokens, hidden_size]) and fills the expert's entries of grad_weights (fp32 [num_tokens,
  // top_k]) of each micro-batch, and calls use(micro-batch, activations) for those with tokens, in ascending order.
  template <class Use>
  void run(const uint8_t* page, int64_t expert, const std::vector<Tensor>& grad_x,
           const std::vector<Tensor>& grad_weights, const Use& use) {
    const Tensor w_gate_up = decoder_.gate_up(page, expert), w_down = decoder_.down(page, expert);
    for (size_t i = 0; i < batches_.size(); ++i) {
      if (batches_[i].routing->tokens(expert) == 0) continue;
      use(i, run(batches_[i], expert, w_gate_up, w_down, grad_x[i], grad_weights[i]));
    }
  }

 private:
  RowBuffer buffer(int64_t cols) const { return RowBuffer(batches_.max_tokens(), cols, batches_[0].x.options()); }

  // What it returns is valid until the next call.
  ExpertActivations run(const MicroBatch& batch, int64_t expert, const Tensor& w_gate_up, const Tensor& w_down,
                        const Tensor& grad_x, const Tensor& grad_weights) {
    const Routing& routing = *batch.routing;
    const DType dtype = layer_.dtype();
    const int64_t n = routing.tokens(expert), hidden_size = w_down.size(1), intermediate_size = w_down.size(0);
    const int32_t* pairs = routing.pairs(expert);
    Tensor x = x_.rows(n), grad_y = grad_y_.rows(n), gate_up = gate_up_.rows(n), grad_gate_up = grad_gate_up_.rows(n),
           grad_h = grad_h_.rows(n), weighted_h = weighted_h_.rows(n), grad_xe = grad_x_.rows(n);
    gather(batch.x, routing, expert, x, dtype);
    gather(batch.grad_out, routing, expert, grad_y, dtype);
    const float* weight_of = batch.weights.const_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i) row_weight_[static_cast<size_t>(i)] = weight_of[pairs[i]];
    at::mm_out(gate_up, x, w_gate_up.t());
    at::mm_out(grad_h, grad_y, w_down.t());
    cpu::glu_backward({grad_h.const_data_ptr(), gate_up.const_data_ptr(), nullptr, row_weight_.data(),
                       grad_gate_up.mutable_data_ptr(), weighted_h.mutable_data_ptr(), grad_row_weight_.data(), n,
                       intermediate_size, false, layer_.activation(), dtype},
                      nullptr);
    float* grad_weight_of = grad_weights.mutable_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i) grad_weight_of[pairs[i]] = grad_row_weight_[static_cast<size_t>(i)];
    at::mm_out(grad_xe, grad_gate_up, w_gate_up);
    cpu::scatter_add_rows({grad_xe.const_data_ptr(), pairs, nullptr, nullptr, grad_x.mutable_data_ptr<float>(), n, 0,
                           hidden_size, routing.top_k(), dtype, dtype},
                          nullptr);
    return {x.const_data_ptr(), grad_y.const_data_ptr(), grad_gate_up.const_data_ptr(), weighted_h.const_data_ptr(), n};
  }

  const ExpertLayer& layer_;
  const MicroBatches& batches_;
  ExpertDecoder decoder_;
  RowBuffer x_, grad_y_, gate_up_, grad_gate_up_, grad_h_, weighted_h_, grad_x_;
  std::vector<float> row_weight_, grad_row_weight_;
};

#ifdef USAF_WITH_GPU
std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> backward_on_gpu(ExpertLayer& layer,
                                                                             const MicroBatches& batches) {
  const GpuBackend::Guard guard(batches[0].x);
  const StreamOrder::Use use(layer.sweep().order(), guard.stream());
  std::vector<Tensor> grad_x, grad_weights;
  for (const MicroBatch& batch : batches)
    grad_x.push_back(at::zeros(batch.x.sizes(), batch.x.options().dtype(at::kFloat)));
  GpuBackward backward(layer, batches, guard.stream());
  for_each_group(layer, batches, Phase::backward, guard.stream(),
                 [&](const std::vector<ExpertPage>& group) { backward.run(group, grad_x); });
  for (size_t i = 0; i < batches.size(); ++i) {
    grad_x[i] = grad_x[i].to(scalar_type(layer.dtype()));
    grad_weights.push_back(backward.grad_weights(i).to(batches[i].weights_type));
  }
  return {std::move(grad_x), std::move(grad_weights), backward.grad_anchor()};
}
#endif

}  // namespace

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> experts_backward_many(
    at::TensorList grad_out, at::TensorList x, at::TensorList index, at::TensorList weights, int64_t handle) {
  ExpertLayer& layer = find_layer(handle);
  const MicroBatches batches(layer, Phase::backward, x, index, weights, grad_out);
#ifdef USAF_WITH_GPU
  if (!batches[0].x.is_cpu()) return backward_on_gpu(layer, batches);
#endif
  const auto f32 = batches[0].x.options().dtype(at::kFloat);
  std::vector<Tensor> grad_x, grad_weights;
  for (const MicroBatch& batch : batches) {
    grad_x.push_back(at::zeros(batch.x.sizes(), f32));
    grad_weights.push_back(at::zeros(batch.weights.sizes(), f32));
  }
  BankNorm norm(layer, batches.size());
  const auto sweep = [&](auto&& backward) {
    for_each_expert(layer, batches, Phase::backward, [&](const uint8_t* page, int64_t expert) {
      backward.run(page, expert, grad_x, grad_weights, [&](size_t i, const ExpertActivations& activations) {
        accumulate_importance(layer, expert, activations);
        if (layer.under_threshold(expert, batches[i].routing->tokens())) {
          layer.num_masked += layer.trained_bank() != nullptr;
          return;
        }
        accumulate_row_gradients(layer, expert, activations);
        norm.record(i, expert);
      });
    });
  };
  // |gradient * weight| reads whole decoded matrices.
  const bool needs_weights =
      layer.importance != nullptr && layer.importance_metric == ImportanceMetric::gradient_weight;
  if (panels_available(layer) && !needs_weights) {
    sweep(PanelBackward(layer, batches));
  } else {
    sweep(MmBackward(layer, batches));
  }

  for (size_t i = 0; i < batches.size(); ++i) {
    grad_x[i] = grad_x[i].to(scalar_type(layer.dtype()));
    grad_weights[i] = grad_weights[i].to(batches[i].weights_type);
  }
  // The anchor's gradient is the increment of the accumulated norm, so that it sums to the norm over micro-batches.
  Tensor grad_anchor = at::empty({1}, f32);
  grad_anchor.fill_(norm.increment());
  return {std::move(grad_x), std::move(grad_weights), std::move(grad_anchor)};
}

}  // namespace usaf

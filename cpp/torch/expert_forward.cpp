// The forward of an expert layer: for each expert e with n tokens of a micro-batch
//   X = gather(x); h = glu(X W_gate_up^T); out += router weight * (h W_down^T)
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "backend.h"
#include "expert_batches.h"
#include "expert_decoder.h"
#include "expert_gpu.h"
#include "expert_ops.h"
#include "expert_panels.h"

namespace torch::autograd {
TORCH_API int get_current_graph_task_id();  // torch/csrc/autograd/graph_task.h, without its includes
}

namespace usaf {
namespace {

using at::Tensor;

bool in_backward() { return torch::autograd::get_current_graph_task_id() != -1; }

// Through matrices decoded as a whole and torch's mm: any format, dtype and CPU.
class MmForward {
 public:
  MmForward(ExpertLayer& layer, const MicroBatches& batches)
      : layer_(layer),
        batches_(batches),
        decoder_(layer),
        x_(batches.max_tokens(), layer.layout().hidden_size, batches[0].x.options()),
        gate_up_(batches.max_tokens(), 2 * layer.layout().intermediate_size, batches[0].x.options()),
        h_(batches.max_tokens(), layer.layout().intermediate_size, batches[0].x.options()),
        y_(batches.max_tokens(), layer.layout().hidden_size, batches[0].x.options()) {}

  // Adds the expert's outputs to out, fp32 [num_tokens, hidden_size] for each micro-batch.
  void run(const uint8_t* page, int64_t expert, const std::vector<Tensor>& out) const {
    const Tensor w_gate_up = decoder_.gate_up(page, expert), w_down = decoder_.down(page, expert);
    for (size_t i = 0; i < batches_.size(); ++i) run(batches_[i], expert, w_gate_up, w_down, out[i]);
  }

 private:
  void run(const MicroBatch& batch, int64_t expert, const Tensor& w_gate_up, const Tensor& w_down,
           const Tensor& out) const {
    const Routing& routing = *batch.routing;
    const int64_t n = routing.tokens(expert);
    if (n == 0) return;
    Tensor x = x_.rows(n), gate_up = gate_up_.rows(n), h = h_.rows(n), y = y_.rows(n);
    gather(batch.x, routing, expert, x, layer_.dtype());
    at::mm_out(gate_up, x, w_gate_up.t());
    cpu::glu({gate_up.const_data_ptr(), nullptr, h.mutable_data_ptr(), n, h.size(1), false, layer_.activation(),
              layer_.dtype()},
             nullptr);
    at::mm_out(y, h, w_down);
    cpu::scatter_add_rows({y.const_data_ptr(), routing.pairs(expert), nullptr, batch.weights.const_data_ptr(),
                           out.mutable_data_ptr<float>(), n, 0, y.size(1), routing.top_k(), layer_.dtype(), DType::f32},
                          nullptr);
  }

  const ExpertLayer& layer_;
  const MicroBatches& batches_;
  ExpertDecoder decoder_;
  RowBuffer x_, gate_up_, h_, y_;
};

void count_tokens(const ExpertLayer& layer, const MicroBatches& batches) {
  if (layer.token_counts == nullptr) return;
  for (int64_t expert = 0; expert < layer.num_experts(); ++expert) {
    int64_t tokens = 0;
    for (const MicroBatch& batch : batches) tokens += batch.routing->tokens(expert);
    layer.token_counts[expert] = static_cast<int32_t>(tokens);
  }
}

}  // namespace

std::vector<Tensor> experts_forward_many(at::TensorList x, at::TensorList index, at::TensorList weights, int64_t handle,
                                         bool training) {
  ExpertLayer& layer = find_layer(handle);
  const Phase phase = in_backward() ? Phase::backward : training ? Phase::training_forward : Phase::inference;
  const MicroBatches batches(layer, phase, x, index, weights);
  count_tokens(layer, batches);
  std::vector<Tensor> out;
  for (const MicroBatch& batch : batches)
    out.push_back(at::zeros(batch.x.sizes(), batch.x.options().dtype(at::kFloat)));
#ifdef USAF_WITH_GPU
  if (!out[0].is_cpu()) {
    const GpuBackend::Guard guard(out[0]);
    const StreamOrder::Use use(layer.sweep().order(), guard.stream());
    const GpuForward forward(layer, batches, guard.stream());
    for_each_group(layer, batches, phase, guard.stream(),
                   [&](const std::vector<ExpertPage>& group) { forward.run(group, out); });
    for (Tensor& result : out) result = result.to(scalar_type(layer.dtype()));
    return out;
  }
#endif
  const auto sweep = [&](auto&& forward) {
    for_each_expert(layer, batches, phase,
                    [&](const uint8_t* page, int64_t expert) { forward.run(page, expert, out); });
  };
  if (panels_available(layer)) {
    sweep(PanelForward(layer, batches));
  } else {
    sweep(MmForward(layer, batches));
  }
  for (Tensor& result : out) result = result.to(scalar_type(layer.dtype()));
  return out;
}

}  // namespace usaf

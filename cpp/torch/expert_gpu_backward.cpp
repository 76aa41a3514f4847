#include "expert_gpu.h"

#ifdef USAF_WITH_GPU
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

namespace usaf {
namespace {

using at::Tensor;

}  // namespace

GpuBankNorm::GpuBankNorm(const ExpertLayer& layer, size_t num_batches, at::TensorOptions options, void* stream)
    : bank_(layer.trained_bank()),
      hidden_size_(layer.layout().hidden_size),
      options_(options.dtype(at::kDouble)),
      stream_(stream) {
  if (bank_ == nullptr) return;
  const int64_t rows = kMatricesPerExpert * bank_->num_neurons();
  after_.push_back(at::for_blob(bank_->pointers().grad_squares, {rows})
                       .options(options_)
                       .target_device(options_.device())
                       .make_tensor()
                       .clone());
  for (size_t i = 0; i < num_batches; ++i) after_.push_back(at::full({rows}, -1.0, options_));
}

void GpuBankNorm::record(size_t batch, int64_t first_neuron, int64_t num_neurons) const {
  const BankPointers& rows = bank_->pointers();
  const int64_t first = kMatricesPerExpert * first_neuron;
  gpu::squares_of_rows({static_cast<const char*>(rows.grad) + first * hidden_size_ * element_size(rows.grad_dtype),
                        after_[batch + 1].mutable_data_ptr<double>() + first, kMatricesPerExpert * num_neurons,
                        hidden_size_, rows.grad_dtype},
                       stream_);
}

Tensor GpuBankNorm::finish() const {
  Tensor total = at::zeros({1}, options_.dtype(at::kFloat));
  if (bank_ == nullptr) return total;
  Tensor before = after_[0], norm_before = before.sum().sqrt();
  for (size_t i = 1; i < after_.size(); ++i) {
    const Tensor after = at::where(after_[i].lt(0), before, after_[i]), norm = after.sum().sqrt();
    total += norm.sub(norm_before).to(at::kFloat);
    before = after;
    norm_before = norm;
  }
  at::for_blob(bank_->pointers().grad_squares, {before.numel()})
      .options(options_)
      .target_device(options_.device())
      .make_tensor()
      .copy_(before);
  return total;
}

GpuBackward::GpuBackward(ExpertLayer& layer, const MicroBatches& batches, void* stream)
    : GpuExperts(layer, batches, stream),
      trained_(layer),
      norm_(layer, batches.size(), batches[0].x.options(), stream),
      x_(buffer(hidden_size_)),
      grad_y_(buffer(hidden_size_)),
      gate_up_(buffer(2 * intermediate_size_)),
      grad_gate_up_(buffer(2 * intermediate_size_)),
      grad_h_(buffer(intermediate_size_)),
      weighted_h_(buffer(intermediate_size_)),
      grad_x_(buffer(hidden_size_)) {
  for (const MicroBatch& batch : batches) {
    // One more than there are rows: what `inverse` clamped to 0 reads must be there.
    grad_row_weights_.push_back(at::zeros({batch.routing->num_rows() + 1}, batch.x.options().dtype(at::kFloat)));
  }
}

void GpuBackward::run(const std::vector<ExpertPage>& group, const std::vector<Tensor>& grad_x) {
  for (const Chunk& chunk : chunks(group)) {
    std::vector<Tensor> row_weights;  // of each part
    for (const Chunk::Part& part : chunk.parts) {
      const MicroBatch& batch = batches_[part.batch];
      gather(part, batch.x, x_);
      gather(part, batch.grad_out, grad_y_);
      const Tensor pairs = batch.routing->source().narrow(0, part.source_row, part.num_rows);
      row_weights.push_back(at::index_select(batch.weights.view(-1), 0, pairs));
    }
    for (const ExpertPage& expert : chunk.experts) differentiate(chunk, expert, row_weights);
    for (const Chunk::Part& part : chunk.parts) {
      scatter(part, grad_x_, /*weighted=*/false, grad_x[part.batch]);
      accumulate_row_gradients(chunk, part);
    }
  }
}

void GpuBackward::differentiate(const Chunk& chunk, const ExpertPage& expert, const std::vector<Tensor>& row_weights) {
  const DecodedExpert weight = decoder_.decode(expert);
  for (size_t i = 0; i < chunk.parts.size(); ++i) {
    const Chunk::Part& part = chunk.parts[i];
    const int64_t n = num_rows(part, expert.expert), first_row = routing(part).first_row(expert.expert);
    if (n == 0) continue;
    Tensor gate_up = rows(gate_up_, part, expert.expert), grad_h = rows(grad_h_, part, expert.expert),
           grad_x = rows(grad_x_, part, expert.expert);
    const Tensor grad_gate_up = rows(grad_gate_up_, part, expert.expert);
    at::mm_out(gate_up, rows(x_, part, expert.expert), weight.gate_up.t());
    at::mm_out(grad_h, rows(grad_y_, part, expert.expert), weight.down.t());
    gpu::glu_backward({grad_h.const_data_ptr(), gate_up.const_data_ptr(), nullptr,
                       row_weights[i].const_data_ptr<float>() + (first_row - part.source_row),
                       grad_gate_up.mutable_data_ptr(), rows(weighted_h_, part, expert.expert).mutable_data_ptr(),
                       grad_row_weights_[part.batch].mutable_data_ptr<float>() + first_row, n, intermediate_size_,
                       false, layer_.activation(), layer_.dtype()},
                      stream_);
    at::mm_out(grad_x, grad_gate_up, weight.gate_up);
    accumulate_importance(part, expert.expert);
  }
}

// While the expert's weights are in the scratch.
void GpuBackward::accumulate_importance(const Chunk::Part& part, int64_t expert) const {
  if (layer_.importance == nullptr) return;
  const bool needs_weights = layer_.importance_metric == ImportanceMetric::gradient_weight;
  gpu::row_importance(
      {rows(x_, part, expert).const_data_ptr(), rows(grad_y_, part, expert).const_data_ptr(),
       rows(grad_gate_up_, part, expert).const_data_ptr(), rows(weighted_h_, part, expert).const_data_ptr(),
       routing(part).offsets().const_data_ptr<int32_t>() + expert, needs_weights ? layer_.scratch() : nullptr,
       layer_.importance + expert * intermediate_size_, 1, hidden_size_, intermediate_size_, layer_.dtype()},
      stream_);
}

// One launch for each run of experts that none under the threshold interrupts.
void GpuBackward::accumulate_row_gradients(const Chunk& chunk, const Chunk::Part& part) {
  const RowBank* bank = layer_.trained_bank();
  if (bank == nullptr) return;
  constexpr int64_t kNone = -1;
  int64_t first = kNone, last = kNone;
  const auto end_run = [&] {
    if (first == kNone) return;
    add_gradients(part, first, last);
    const int64_t first_neuron = bank->first_neuron(first), count = bank->first_neuron(last + 1) - first_neuron;
    if (count > 0) norm_.record(part.batch, first_neuron, count);
    first = kNone;
  };
  for (const ExpertPage& page : chunk.experts) {
    if (num_rows(part, page.expert) == 0) continue;
    if (layer_.under_threshold(page.expert, routing(part).tokens())) {
      ++trained_.num_masked;
      end_run();
      continue;
    }
    if (bank->pointers().expert_hit != nullptr) bank->pointers().expert_hit[page.expert] = 1;
    if (first == kNone) first = page.expert;
    last = page.expert;
  }
  end_run();
}

void GpuBackward::add_gradients(const Chunk::Part& part, int64_t first_expert, int64_t last_expert) const {
  const RowBank& bank = *layer_.trained_bank();
  const BankPointers& rows = bank.pointers();
  const int64_t first = bank.first_neuron(first_expert), count = bank.first_neuron(last_expert + 1) - first;
  const auto from = [&](const Tensor& buffer) { return this->rows(buffer, part, first_expert).const_data_ptr(); };
  gpu::row_gradient(
      {from(x_), from(grad_y_), from(grad_gate_up_), from(weighted_h_),
       routing(part).offsets().const_data_ptr<int32_t>() + first_expert, rows.neuron_expert + first,
       rows.neuron_index + first,
       static_cast<char*>(rows.grad) + first * kMatricesPerExpert * hidden_size_ * element_size(rows.grad_dtype), count,
       first_expert, last_expert - first_expert + 1, hidden_size_, intermediate_size_, layer_.dtype(), rows.grad_dtype},
      stream_);
}

Tensor GpuBackward::grad_weights(size_t batch) const {
  const Tensor inverse = batches_[batch].routing->inverse(), values = grad_row_weights_[batch];
  const Tensor of_pairs = at::index_select(values, 0, inverse.clamp_min(0).view(-1)).view(inverse.sizes());
  return at::where(inverse.lt(0), at::zeros({}, values.options()), of_pairs);
}

}  // namespace usaf
#endif

#include "expert_panels.h"

#include <algorithm>

#include "../cpu/parallel.h"
#include "brgemm.h"

namespace usaf {
namespace {

using at::Tensor;
using cpu::kPanelColumns;

constexpr int64_t kWide = cpu::kPanelsAtOnce * kPanelColumns;
constexpr int64_t kResultCols = kWide + kPanelColumns;  // what a thread keeps for each row: gate, up, h; or y
// Depth of a piece of a transposed panel, and of a pair of straight ones: 256 KB, so that it stays in the L2 cache.
constexpr int64_t kTransposedDepth = 2048, kStraightDepth = 1024;

int64_t num_panels(int64_t cols, int64_t width) { return (cols + width - 1) / width; }

const Bf16* bf16_data(const Tensor& tensor) { return static_cast<const Bf16*>(tensor.const_data_ptr()); }
Bf16* bf16_data_mut(const Tensor& tensor) { return static_cast<Bf16*>(tensor.mutable_data_ptr()); }

cpu::RowOverlay overlay(const RowBank* bank, int64_t expert, int matrix) {
  if (bank == nullptr) return {};
  return {bank->pointers().codes, bank->pointers().absmax, bank->bank_rows(matrix, expert), bank->row_targets(expert),
          bank->first_neuron(expert + 1) - bank->first_neuron(expert)};
}

}  // namespace

bool panels_available(const ExpertLayer& layer) {
  const PageLayout& layout = layer.layout();
  // The GEMM takes the depth in pairs; a bank's rows are rows of the encoded matrix.
  const bool fits =
      layout.hidden_size % 2 == 0 && layout.intermediate_size % 2 == 0 && layout.down_axis == DownAxis::hidden;
  return fits && layer.dtype() == DType::bf16 && cpu::panels_supported() && brgemm_available();
}

PanelExperts::PanelExperts(const ExpertLayer& layer, const MicroBatches& batches)
    : layer_(layer),
      batches_(batches),
      hidden_size_(layer.layout().hidden_size),
      intermediate_size_(layer.layout().intermediate_size) {
  for (const int64_t expert : batches.experts()) {
    int64_t rows = 0;
    for (const MicroBatch& batch : batches) rows += batch.routing->tokens(expert);
    max_rows_ = std::max(max_rows_, rows);
  }
  const int64_t transposed = round_up(std::min(hidden_size_, kTransposedDepth), cpu::kPanelStep) * kPanelColumns;
  const int64_t straight = round_up(std::min(intermediate_size_, kStraightDepth), cpu::kPanelStep) * kWide;
  panel_elements_ = std::max(transposed, straight);
  // GEMM workspace, as torch's own GEMMs have it: not part of the device budget.
  const auto options = batches[0].x.options();
  panels_ = at::empty({cpu::max_workers(), panel_elements_}, options);
  results_ = at::empty({cpu::max_workers(), max_rows_ * kResultCols}, options.dtype(at::kFloat));
}

void PanelExperts::place_tokens(int64_t expert) {
  segments_.clear();
  num_rows_ = 0;
  for (size_t i = 0; i < batches_.size(); ++i) {
    const int64_t tokens = batches_[i].routing->tokens(expert);
    if (tokens > 0) segments_.push_back({i, num_rows_, tokens});
    num_rows_ += tokens;
  }
}

cpu::EncodedMatrix PanelExperts::encoded(const uint8_t* page, int64_t expert, int matrix) const {
  const PageLayout& layout = layer_.layout();
  return {layout.format,
          intermediate_size_,
          hidden_size_,
          page + layout.codes_offset[matrix],
          page + layout.absmax_offset[matrix],
          {overlay(layer_.frozen_bank.get(), expert, matrix), overlay(layer_.bank.get(), expert, matrix)}};
}

void PanelExperts::multiply(const Tensor& rows, int64_t first_col, int64_t depth, const Bf16* panel, float* results,
                            int64_t results_stride, bool add) const {
  const int64_t stride = rows.size(1);
  for (const Segment& segment : segments_) {
    brgemm(bf16_data(rows) + segment.first_row * stride + first_col, stride, segment.num_rows, depth, panel,
           results + segment.first_row * results_stride, results_stride, add);
  }
}

void PanelExperts::multiply_transposed(const cpu::EncodedMatrix& matrix, int64_t first_row, const Tensor& rows,
                                       Bf16* panel, float* results, int64_t results_stride) const {
  for (int64_t start = 0; start < hidden_size_; start += kTransposedDepth) {
    const int64_t depth = std::min(kTransposedDepth, hidden_size_ - start);
    cpu::decode_transposed_panel(matrix, first_row, start, depth, panel);
    multiply(rows, start, depth, panel, results, results_stride, start > 0);
  }
}

void PanelExperts::multiply_straight(const cpu::EncodedMatrix& matrix, int64_t first_col, const Tensor& rows,
                                     int64_t first_input, Bf16* panels, float* results, bool add) const {
  for (int64_t start = 0; start < intermediate_size_; start += kStraightDepth) {
    const int64_t depth = std::min(kStraightDepth, intermediate_size_ - start);
    cpu::decode_panels(matrix, start, depth, first_col, panels);
    for (int64_t i = 0; i < cpu::kPanelsAtOnce; ++i) {
      multiply(rows, first_input + start, depth, panels + i * round_up(depth, cpu::kPanelStep) * kPanelColumns,
               results + i * kPanelColumns, kWide, add || start > 0);
    }
  }
}

void PanelExperts::scatter(int64_t expert, const float* results, int64_t first_col, bool weighted,
                           const std::vector<Tensor>& out) const {
  const int64_t cols = std::min(kWide, hidden_size_ - first_col);
  for (const Segment& segment : segments_) {
    const MicroBatch& batch = batches_[segment.batch];
    const int32_t* pairs = batch.routing->pairs(expert);
    const float* weights = batch.weights.const_data_ptr<float>();
    float* to = out[segment.batch].mutable_data_ptr<float>() + first_col;
    for (int64_t row = 0; row < segment.num_rows; ++row) {
      cpu::add_scaled_row(results + (segment.first_row + row) * kWide, weighted ? weights[pairs[row]] : 1.0f, cols,
                          to + pairs[row] / batch.routing->top_k() * hidden_size_);
    }
  }
}

Tensor PanelExperts::rows(int64_t cols) const { return at::empty({max_rows_, cols}, batches_[0].x.options()); }

Bf16* PanelExperts::panel_of(int64_t worker) const { return bf16_data_mut(panels_) + worker * panel_elements_; }

float* PanelExperts::results_of(int64_t worker) const {
  return results_.mutable_data_ptr<float>() + worker * max_rows_ * kResultCols;
}

PanelForward::PanelForward(const ExpertLayer& layer, const MicroBatches& batches)
    : PanelExperts(layer, batches), x_(rows(hidden_size_)), h_(rows(intermediate_size_)) {}

void PanelForward::run(const uint8_t* page, int64_t expert, const std::vector<Tensor>& out) {
  place_tokens(expert);
  for (const Segment& segment : segments_) {
    const MicroBatch& batch = batches_[segment.batch];
    gather(batch.x, *batch.routing, expert, x_.narrow(0, segment.first_row, segment.num_rows), DType::bf16);
  }
  const cpu::EncodedMatrix gate = encoded(page, expert, 0), up = encoded(page, expert, 1),
                           down = encoded(page, expert, 2);
  cpu::parallel_for_workers(num_panels(intermediate_size_, kPanelColumns), [&](int64_t i, int64_t worker) {
    const int64_t first = i * kPanelColumns, cols = std::min(kPanelColumns, intermediate_size_ - first);
    float* gate_up = results_of(worker);  // gate beside up
    multiply_transposed(gate, first, x_, panel_of(worker), gate_up, kWide);
    multiply_transposed(up, first, x_, panel_of(worker), gate_up + kPanelColumns, kWide);
    brgemm_release();
    float* h = gate_up + num_rows_ * kWide;
    cpu::glu({gate_up, nullptr, h, num_rows_, kPanelColumns, false, layer_.activation(), DType::f32}, nullptr);
    cpu::round_tile(h, kPanelColumns, num_rows_, cols, bf16_data_mut(h_) + first, intermediate_size_);
  });
  cpu::parallel_for_workers(num_panels(hidden_size_, kWide), [&](int64_t i, int64_t worker) {
    float* y = results_of(worker);
    multiply_straight(down, i * kWide, h_, 0, panel_of(worker), y, false);
    brgemm_release();
    scatter(expert, y, i * kWide, /*weighted=*/true, out);
  });
}

PanelBackward::PanelBackward(const ExpertLayer& layer, const MicroBatches& batches)
    : PanelExperts(layer, batches),
      x_(rows(hidden_size_)),
      grad_y_(rows(hidden_size_)),
      grad_gate_up_(rows(2 * intermediate_size_)),
      weighted_h_(rows(intermediate_size_)),
      row_weight_(static_cast<size_t>(max_rows_)),
      grad_row_weight_(static_cast<size_t>(max_rows_ * num_panels(intermediate_size_, kPanelColumns))) {}

void PanelBackward::differentiate_panel(const uint8_t* page, int64_t expert, int64_t panel, int64_t worker) {
  const int64_t first = panel * kPanelColumns, cols = std::min(kPanelColumns, intermediate_size_ - first);
  float* gate_up = results_of(worker);          // gate beside up; in the end their gradients
  float* grad_h = gate_up + num_rows_ * kWide;  // in the end the weighted h
  multiply_transposed(encoded(page, expert, 0), first, x_, panel_of(worker), gate_up, kWide);
  multiply_transposed(encoded(page, expert, 1), first, x_, panel_of(worker), gate_up + kPanelColumns, kWide);
  multiply_transposed(encoded(page, expert, 2), first, grad_y_, panel_of(worker), grad_h, kPanelColumns);
  brgemm_release();
  cpu::glu_backward(
      {grad_h, gate_up, nullptr, row_weight_.data(), gate_up, grad_h, grad_row_weight_.data() + panel * max_rows_,
       num_rows_, kPanelColumns, false, layer_.activation(), DType::f32},
      nullptr);
  Bf16* grad_gate_up = bf16_data_mut(grad_gate_up_) + first;
  cpu::round_tile(gate_up, kWide, num_rows_, cols, grad_gate_up, 2 * intermediate_size_);
  cpu::round_tile(gate_up + kPanelColumns, kWide, num_rows_, cols, grad_gate_up + intermediate_size_,
                  2 * intermediate_size_);
  cpu::round_tile(grad_h, kPanelColumns, num_rows_, cols, bf16_data_mut(weighted_h_) + first, intermediate_size_);
}

void PanelBackward::compute(const uint8_t* page, int64_t expert, const std::vector<Tensor>& grad_x,
                            const std::vector<Tensor>& grad_weights) {
  place_tokens(expert);
  for (const Segment& segment : segments_) {
    const MicroBatch& batch = batches_[segment.batch];
    gather(batch.x, *batch.routing, expert, x_.narrow(0, segment.first_row, segment.num_rows), DType::bf16);
    gather(batch.grad_out, *batch.routing, expert, grad_y_.narrow(0, segment.first_row, segment.num_rows), DType::bf16);
    const int32_t* pairs = batch.routing->pairs(expert);
    const float* weights = batch.weights.const_data_ptr<float>();
    for (int64_t row = 0; row < segment.num_rows; ++row) {
      row_weight_[static_cast<size_t>(segment.first_row + row)] = weights[pairs[row]];
    }
  }
  const int64_t h_panels = num_panels(intermediate_size_, kPanelColumns);
  cpu::parallel_for_workers(h_panels,
                            [&](int64_t panel, int64_t worker) { differentiate_panel(page, expert, panel, worker); });
  for (const Segment& segment : segments_) {
    const int32_t* pairs = batches_[segment.batch].routing->pairs(expert);
    float* to = grad_weights[segment.batch].mutable_data_ptr<float>();
    for (int64_t row = 0; row < segment.num_rows; ++row) {
      float sum = 0.0f;  // over the panels in ascending order
      for (int64_t panel = 0; panel < h_panels; ++panel) {
        sum += grad_row_weight_[static_cast<size_t>(panel * max_rows_ + segment.first_row + row)];
      }
      to[pairs[row]] = sum;
    }
  }
  const cpu::EncodedMatrix gate = encoded(page, expert, 0), up = encoded(page, expert, 1);
  cpu::parallel_for_workers(num_panels(hidden_size_, kWide), [&](int64_t i, int64_t worker) {
    float* grad_xe = results_of(worker);
    multiply_straight(gate, i * kWide, grad_gate_up_, 0, panel_of(worker), grad_xe, false);
    multiply_straight(up, i * kWide, grad_gate_up_, intermediate_size_, panel_of(worker), grad_xe, true);
    brgemm_release();
    scatter(expert, grad_xe, i * kWide, /*weighted=*/false, grad_x);
  });
}

ExpertActivations PanelBackward::activations(const Segment& segment) const {
  const int64_t row = segment.first_row;
  return {bf16_data(x_) + row * hidden_size_, bf16_data(grad_y_) + row * hidden_size_,
          bf16_data(grad_gate_up_) + row * 2 * intermediate_size_, bf16_data(weighted_h_) + row * intermediate_size_,
          segment.num_rows};
}

}  // namespace usaf

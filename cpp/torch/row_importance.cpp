// Importance through GEMMs on bf16 panels: for each expert the gradients of all neurons, gate and up [2I, tokens] x
// [tokens, hidden] and down [I, tokens] x [tokens, hidden], in tiles of 64 x 64 that are reduced while they are in the
// L1 cache.
#include "row_importance.h"

#include <algorithm>
#include <vector>

#include "../cpu/importance.h"
#include "../cpu/panel.h"
#include "../cpu/parallel.h"
#include "brgemm.h"

namespace usaf {
namespace {

using cpu::kPanelColumns;

constexpr int64_t kTileRows = 64;
// Tokens of one GEMM. Coefficients stand in slices of so many, so that torch compiles a kernel for each possible length
// of the last slice, and not for each number of tokens.
constexpr int64_t kSlice = 512;

int64_t num_panels(int64_t cols) { return (cols + kPanelColumns - 1) / kPanelColumns; }

// The transpose of up to kSlice tokens' coefficients: [cols, round_up(tokens, 32)].
struct Slice {
  int64_t first_token, depth;
  Bf16* coefficients;
};

class ExpertImportance {
 public:
  explicit ExpertImportance(const RowImportanceArgs& args)
      : args_(args), hidden_panels_(num_panels(args.hidden_size)), padded_(num_panels(args.intermediate_size) * 64) {
    for (int64_t e = 0; e < args.num_experts; ++e) {
      max_tokens_ = std::max<int64_t>(max_tokens_, args.offsets[e + 1] - args.offsets[e]);
    }
    max_depth_ = round_up(max_tokens_, cpu::kPanelStep);
    coefficients_.resize(static_cast<size_t>(3 * padded_ * max_depth_));
    panels_.resize(static_cast<size_t>(cpu::max_workers() * max_depth_ * kPanelColumns));
    sums_.resize(static_cast<size_t>(hidden_panels_ * args.intermediate_size));
  }

  void add(int64_t expert) {
    expert_ = expert;
    first_ = args_.offsets[expert] - args_.offsets[0];
    num_tokens_ = args_.offsets[expert + 1] - args_.offsets[expert];
    if (num_tokens_ == 0) return;
    transpose();
    std::fill(sums_.begin(), sums_.end(), 0.0);
    cpu::parallel_for_workers(hidden_panels_, [&](int64_t panel, int64_t worker) {
      Bf16* packed = panels_.data() + worker * max_depth_ * kPanelColumns;
      for (const int matrix : {0, 1, 2}) {
        if (matrix != 1) pack(matrix == 0 ? args_.x : args_.grad_out, panel, packed);
        reduce(matrix, panel, packed);
      }
      brgemm_release();
    });
    float* importance = args_.importance + expert * args_.intermediate_size;
    for (int64_t neuron = 0; neuron < args_.intermediate_size; ++neuron) {
      double sum = 0.0;  // over the panels in ascending order, so that the bits do not depend on the threads
      for (int64_t panel = 0; panel < hidden_panels_; ++panel) {
        sum += sums_[static_cast<size_t>(panel * args_.intermediate_size + neuron)];
      }
      importance[neuron] += static_cast<float>(sum);
    }
  }

 private:
  int64_t slice_depth(int64_t token) const { return round_up(std::min(kSlice, num_tokens_ - token), cpu::kPanelStep); }

  // Of the slice that starts at `token`: rows [matrix * padded_ ..) of [3 * padded_, slice_depth(token)].
  Bf16* coefficients(int matrix, int64_t token) {
    return coefficients_.data() + 3 * padded_ * token + matrix * padded_ * slice_depth(token);
  }

  void transpose() {
    const int64_t panels = num_panels(args_.intermediate_size);
    cpu::parallel_for_workers(3 * panels, [&](int64_t item, int64_t) {
      const int matrix = static_cast<int>(item / panels);
      const int64_t column = item % panels * kPanelColumns, intermediate_size = args_.intermediate_size;
      const int64_t stride = matrix == 2 ? intermediate_size : 2 * intermediate_size;
      const Bf16* from = static_cast<const Bf16*>(matrix == 2 ? args_.weighted_h : args_.grad_gate_up) +
                         first_ * stride + (matrix == 1 ? intermediate_size : 0) + column;
      for (int64_t token = 0; token < num_tokens_; token += kSlice) {
        cpu::transpose_columns(from + token * stride, stride, std::min(kSlice, num_tokens_ - token),
                               std::min(kPanelColumns, intermediate_size - column),
                               coefficients(matrix, token) + column * slice_depth(token), slice_depth(token));
      }
    });
  }

  void pack(const void* rows, int64_t panel, Bf16* packed) const {
    const int64_t column = panel * kPanelColumns;
    cpu::pack_panel(static_cast<const Bf16*>(rows) + first_ * args_.hidden_size + column, args_.hidden_size,
                    num_tokens_, std::min(kPanelColumns, args_.hidden_size - column), packed);
  }

  void reduce(int matrix, int64_t panel, const Bf16* packed) {
    alignas(64) float tile[kTileRows * kPanelColumns];
    const int64_t intermediate_size = args_.intermediate_size, hidden_size = args_.hidden_size;
    const int64_t column = panel * kPanelColumns;
    for (int64_t row = 0; row < intermediate_size; row += kTileRows) {
      for (int64_t token = 0; token < num_tokens_; token += kSlice) {
        const int64_t depth = slice_depth(token);
        brgemm(coefficients(matrix, token) + row * depth, depth, kTileRows, depth, packed + token * kPanelColumns, tile,
               kPanelColumns, token > 0);
      }
      const Bf16* weights = static_cast<const Bf16*>(args_.weights);
      if (weights != nullptr) weights += ((expert_ * 3 + matrix) * intermediate_size + row) * hidden_size + column;
      cpu::add_importance(cpu::ImportanceTile<Bf16>{tile, kPanelColumns, weights, hidden_size,
                                                    std::min(kTileRows, intermediate_size - row),
                                                    std::min(kPanelColumns, hidden_size - column)},
                          sums_.data() + panel * intermediate_size + row);
    }
  }

  const RowImportanceArgs& args_;
  const int64_t hidden_panels_, padded_;  // padded_: intermediate_size to whole tiles
  int64_t max_tokens_ = 0, max_depth_ = 0;
  int64_t expert_ = 0, first_ = 0, num_tokens_ = 0;
  std::vector<Bf16> coefficients_, panels_;
  std::vector<double> sums_;  // [hidden_panels_, intermediate_size]
};

}  // namespace

void row_importance(const RowImportanceArgs& args, void* stream) {
  if (args.dtype != DType::bf16 || !cpu::panels_supported() || !brgemm_available()) {
    return cpu::row_importance(args, stream);
  }
  ExpertImportance importance(args);
  for (int64_t expert = 0; expert < args.num_experts; ++expert) importance.add(expert);
}

}  // namespace usaf

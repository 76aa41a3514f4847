// An expert's GEMMs on panels: 64 columns of a weight matrix are decoded into a thread's own cache and multiplied at
// once (cpu/panel.h, brgemm.h). Threads share the panels of an expert, so each result is computed by one thread, in one
// order: the bits do not depend on the number of threads.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "../cpu/panel.h"
#include "expert_batches.h"
#include "expert_gradients.h"

namespace usaf {

// The tokens that one expert has in one micro-batch, as rows of buffers that hold those of all micro-batches.
struct Segment {
  size_t batch;
  int64_t first_row, num_rows;
};

// What forward and backward share: where an expert's tokens stand, its encoded matrices and the threads' scratch.
class PanelExperts {
 protected:
  PanelExperts(const ExpertLayer& layer, const MicroBatches& batches);

  // Sets segments_ and num_rows_ to those of `expert`.
  void place_tokens(int64_t expert);
  cpu::EncodedMatrix encoded(const uint8_t* page, int64_t expert, int matrix) const;
  // results[:, 0:64] (+)= rows [num_rows_, depth] * panel, for each segment.
  void multiply(const at::Tensor& rows, int64_t first_col, int64_t depth, const Bf16* panel, float* results,
                int64_t results_stride, bool add) const;
  // results[:, 0:64] = rows [num_rows_, hidden_size] * W[first_row : first_row + 64]^T
  void multiply_transposed(const cpu::EncodedMatrix& matrix, int64_t first_row, const at::Tensor& rows, Bf16* panel,
                           float* results, int64_t results_stride) const;
  // results[:, 0:128] (+)= rows[:, first_input : first_input + num_rows of W] * W[:, first_col : first_col + 128]
  void multiply_straight(const cpu::EncodedMatrix& matrix, int64_t first_col, const at::Tensor& rows,
                         int64_t first_input, Bf16* panels, float* results, bool add) const;
  // Adds results [num_rows_, 128], times the router weight if `weighted`, to out[batch][token, first_col : +128].
  void scatter(int64_t expert, const float* results, int64_t first_col, bool weighted,
               const std::vector<at::Tensor>& out) const;

  at::Tensor rows(int64_t cols) const;  // bf16 [largest num_rows_, cols]
  Bf16* panel_of(int64_t worker) const;
  float* results_of(int64_t worker) const;

  const ExpertLayer& layer_;
  const MicroBatches& batches_;
  int64_t hidden_size_, intermediate_size_, max_rows_ = 0, num_rows_ = 0;
  std::vector<Segment> segments_;

 private:
  int64_t panel_elements_;
  at::Tensor panels_, results_;
};

class PanelForward : PanelExperts {
 public:
  PanelForward(const ExpertLayer& layer, const MicroBatches& batches);
  // Adds the expert's outputs to out, fp32 [num_tokens, hidden_size] for each micro-batch.
  void run(const uint8_t* page, int64_t expert, const std::vector<at::Tensor>& out);

 private:
  at::Tensor x_, h_;
};

class PanelBackward : PanelExperts {
 public:
  PanelBackward(const ExpertLayer& layer, const MicroBatches& batches);
  // Adds to grad_x (fp32 [num_tokens, hidden_size]) and fills the expert's entries of grad_weights (fp32 [num_tokens,
  // top_k]) of each micro-batch, then calls use(micro-batch, activations) for those with tokens, in ascending order.
  template <class Use>
  void run(const uint8_t* page, int64_t expert, const std::vector<at::Tensor>& grad_x,
           const std::vector<at::Tensor>& grad_weights, const Use& use) {
    compute(page, expert, grad_x, grad_weights);
    for (const Segment& segment : segments_) use(segment.batch, activations(segment));
  }

 private:
  void compute(const uint8_t* page, int64_t expert, const std::vector<at::Tensor>& grad_x,
               const std::vector<at::Tensor>& grad_weights);
  void differentiate_panel(const uint8_t* page, int64_t expert, int64_t panel, int64_t worker);
  ExpertActivations activations(const Segment& segment) const;

  at::Tensor x_, grad_y_, grad_gate_up_, weighted_h_;
  std::vector<float> row_weight_, grad_row_weight_;  // the latter [panels of h][max_rows_]
};

}  // namespace usaf

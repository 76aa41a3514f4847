// Gradients of an expert layer's trained rows: accumulation into the bank, importance, and the bank's norm.
#pragma once
#include <cstdint>
#include <vector>

#include "expert_layer.h"

namespace usaf {

// The activations of one expert's tokens in one backward, rows in permuted order.
struct ExpertActivations {
  const void* x;             // [num_tokens, hidden_size]
  const void* grad_out;      // [num_tokens, hidden_size]
  const void* grad_gate_up;  // [num_tokens, 2 * intermediate_size]
  const void* weighted_h;    // [num_tokens, intermediate_size]
  int64_t num_tokens;
};

// Adds the gradients of the expert's selected rows to the bank and keeps its sum of squares up to date. No bank, or one
// without gradients: does nothing.
void accumulate_row_gradients(const ExpertLayer& layer, int64_t expert, const ExpertActivations& activations);

// Adds the importance of all the expert's neurons, if it is being measured. The metric gradient_weight reads the
// decoded matrices in the layer's scratch (expert_decoder.h).
void accumulate_importance(const ExpertLayer& layer, int64_t expert, const ExpertActivations& activations);

// What each micro-batch of one backward adds to the norm of the bank's gradient. The bank keeps sums of squares per
// expert; this keeps them as they stood after each micro-batch, so that experts may be the outer loop.
class BankNorm {
 public:
  BankNorm(const ExpertLayer& layer, size_t num_batches);
  // Call for every expert that a micro-batch changed, micro-batches ascending for each expert.
  void record(size_t batch, int64_t expert);
  // The sum, in ascending order and fp32, of the micro-batches' increments.
  float increment() const;

 private:
  const double* squares_;                   // the bank's, or null
  std::vector<std::vector<double>> after_;  // [1 + num_batches][num_experts]
};

}  // namespace usaf

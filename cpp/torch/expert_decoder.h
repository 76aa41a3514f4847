// Decodes the matrices of one expert into the layer's scratch ([3, intermediate_size, hidden_size]: gate, up, down^T):
// the page first, then the bank rows over it. Where a page holds W_down as it is, so does the scratch, except while
// importance by weights, which reads the scratch, is measured.
#pragma once
#include <ATen/core/Tensor.h>

#include "expert_layer.h"

namespace usaf {

class ExpertDecoder {
 public:
  explicit ExpertDecoder(ExpertLayer& layer);

  // Rows of gate above rows of up: [2 * intermediate_size, hidden_size].
  at::Tensor gate_up(const uint8_t* page, int64_t expert) const;
  // W_down^T: [intermediate_size, hidden_size]; a transposed view where the scratch holds W_down as it is.
  at::Tensor down(const uint8_t* page, int64_t expert) const;

 private:
  void* target(int matrix) const;
  at::Tensor view(int matrix, int64_t count) const;
  void decode(const uint8_t* page, int64_t expert, int matrix, int count) const;
  at::Tensor down_as_it_is(const uint8_t* page, int64_t expert) const;
  void overlay_columns(const RowBank* bank, int64_t expert, const at::Tensor& down) const;
  void overlay(const RowBank* bank, int64_t expert, int matrix, int count) const;

  ExpertLayer& layer_;
  const PageLayout& layout_;
  at::TensorOptions options_;
};

}  // namespace usaf

// Decodes the matrices of one expert into the layer's scratch ([3, intermediate_size, hidden_size]: gate, up, down^T):
// the page first, then the bank rows over it.
#pragma once
#include <ATen/core/Tensor.h>

#include "expert_layer.h"

namespace usaf {

class ExpertDecoder {
 public:
  explicit ExpertDecoder(ExpertLayer& layer);

  // Rows of gate above rows of up: [2 * intermediate_size, hidden_size].
  at::Tensor gate_up(const uint8_t* page, int64_t expert) const;
  // W_down^T: [intermediate_size, hidden_size].
  at::Tensor down(const uint8_t* page, int64_t expert) const;

 private:
  void* target(int matrix) const;
  at::Tensor view(int matrix, int64_t count) const;
  void decode(const uint8_t* page, int64_t expert, int matrix, int count) const;
  void overlay(const RowBank* bank, int64_t expert, int matrix, int count) const;

  ExpertLayer& layer_;
  const PageLayout& layout_;
  at::TensorOptions options_;
};

}  // namespace usaf

// The inputs of an expert layer's ops: micro-batches with their routing, and the sweep over the pages that they need.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "expert_layer.h"
#include "expert_routing.h"

namespace usaf {

inline at::ScalarType scalar_type(DType dtype) {
  return dtype == DType::f32 ? at::kFloat : dtype == DType::bf16 ? at::kBFloat16 : at::kHalf;
}

struct MicroBatch {
  at::Tensor x;         // [num_tokens, hidden_size] of the layer's dtype
  at::Tensor weights;   // fp32 [num_tokens, top_k]
  at::Tensor grad_out;  // like x; undefined in a forward
  at::ScalarType weights_type;
  std::shared_ptr<const Routing> routing;
};

// The micro-batches of one call, in the order in which their results add up.
class MicroBatches {
 public:
  // Checks everything before it returns; raises Python's TypeError or ValueError.
  MicroBatches(ExpertLayer& layer, Phase phase, at::TensorList x, at::TensorList index, at::TensorList weights,
               std::optional<at::TensorList> grad_out = std::nullopt);

  size_t size() const { return batches_.size(); }
  const MicroBatch& operator[](size_t i) const { return batches_[i]; }
  auto begin() const { return batches_.begin(); }
  auto end() const { return batches_.end(); }

  const std::vector<int64_t>& experts() const { return experts_; }  // with a token in any micro-batch, ascending
  int64_t max_tokens() const { return max_tokens_; }                // of one expert in one micro-batch
  bool dense() const { return dense_; }                             // is_dense of all pairs

 private:
  std::vector<MicroBatch> batches_;
  std::vector<int64_t> experts_;
  int64_t max_tokens_ = 0;
  bool dense_;
};

ExpertLayer& find_layer(int64_t handle);

// Calls `body(page, expert)` for each routed expert in ascending order, with its page in a slot.
template <class Body>
void for_each_expert(ExpertLayer& layer, const MicroBatches& batches, Phase phase, const Body& body) {
  layer.sweep().for_each_expert(layer.layer(), batches.experts(), batches.dense(), phase, nullptr, body);
}

// Calls `body(group)` for groups of routed experts in ascending order, whose pages come in on a stream of their own.
template <class Body>
void for_each_group(ExpertLayer& layer, const MicroBatches& batches, Phase phase, Device::Stream stream,
                    const Body& body) {
  layer.sweep().for_each_group(layer.layer(), batches.experts(), batches.dense(), phase, stream, body);
}

// The first n rows of a buffer that was made for the largest expert.
class RowBuffer {
 public:
  RowBuffer(int64_t max_rows, int64_t cols, at::TensorOptions options)
      : buffer_(at::empty({max_rows, cols}, options)) {}
  at::Tensor rows(int64_t n) const { return buffer_.narrow(0, 0, n); }

 private:
  at::Tensor buffer_;
};

// Rows of x whose tokens went to `expert`, in the order of routing.pairs(expert).
inline void gather(const at::Tensor& x, const Routing& routing, int64_t expert, const at::Tensor& out, DType dtype) {
  cpu::gather_rows({x.const_data_ptr(), routing.pairs(expert), out.mutable_data_ptr(), out.size(0), x.size(1),
                    routing.top_k(), dtype},
                   nullptr);
}

}  // namespace usaf

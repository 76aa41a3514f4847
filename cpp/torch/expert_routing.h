// Which tokens go to which expert: the (token, slot) pairs of a micro-batch sorted by expert. The tables lie on the
// layer's device, the counts on the host, which schedules by them.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "expert_layer.h"

namespace usaf {

class Routing {
 public:
  // Tables for `index` [num_tokens, top_k] on its device, to be filled by a sort.
  Routing(const at::Tensor& index, int64_t num_experts);

  // What a backend's sort_by_expert fills. `counts`: its scratch, or null.
  SortByExpertArgs sort_arguments(const at::Tensor& index, int32_t* counts) const;
  // `offsets`: what it filled, on the host.
  void set_counts(const int32_t* offsets);

  int64_t num_experts() const { return offsets_.numel() - 1; }
  int64_t top_k() const { return inverse_.size(1); }
  const std::vector<int64_t>& tokens() const { return tokens_; }  // per expert
  int64_t tokens(int64_t expert) const { return tokens_[static_cast<size_t>(expert)]; }
  int64_t num_rows() const { return first_rows_.back(); }  // of all experts

  // The first row of an expert's tokens in permuted order, and the pairs from there on.
  int64_t first_row(int64_t expert) const { return first_rows_[static_cast<size_t>(expert)]; }
  const int32_t* pairs(int64_t expert) const { return source_.const_data_ptr<int32_t>() + first_row(expert); }

  const at::Tensor& offsets() const { return offsets_; }  // int32 [num_experts + 1]
  const at::Tensor& source() const { return source_; }    // int32 [num_tokens * top_k]
  const at::Tensor& inverse() const { return inverse_; }  // int32 [num_tokens, top_k]

 private:
  at::Tensor offsets_, source_, inverse_;
  std::vector<int64_t> tokens_, first_rows_;
};

using Routings = std::vector<std::shared_ptr<const Routing>>;

// The routings of a layer's latest forwards, for as long as their index tensors live: a backward neither sorts again
// nor waits for the counts.
class KeptRoutings {
 public:
  std::shared_ptr<const Routing> find(const at::Tensor& index) const;  // null if it is not kept
  // In place of what was kept for the same memory.
  void keep(const at::Tensor& index, std::shared_ptr<const Routing> routing);

 private:
  struct Entry {
    bool is_of(const at::Tensor& index) const;

    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    int64_t storage_offset;
    std::vector<int64_t> sizes, strides;
    int64_t version;
    std::shared_ptr<const Routing> routing;
  };
  std::vector<Entry> entries_;
};

// The routings of a forward's micro-batches, from `index`, int64 each: sorted anew, since what is written to
// an index need not pass through torch. On a GPU that is one host wait for all of them, and the pages of a dense
// forward are on their way meanwhile.
Routings sorted_routings(ExpertLayer& layer, const std::vector<at::Tensor>& index, Phase phase);
// Those of a backward: its forward's, kept under the very tensors. Others are sorted as above.
Routings kept_routings(ExpertLayer& layer, const std::vector<at::Tensor>& index);

}  // namespace usaf

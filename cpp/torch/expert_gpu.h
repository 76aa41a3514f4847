// The expert layer on a GPU: everything is queued on the caller's stream, and nothing here waits for it.
//
// An expert is decoded into the layer's scratch in one launch, the banks' rows over it in one more each, and multiplied
// by torch's mm. Around the GEMMs the tokens of several experts are gathered and scattered together (a chunk), so many
// that a launch is worth its while, so few that their rows stay a small part of the memory.
#pragma once
#ifdef USAF_WITH_GPU
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "expert_batches.h"

namespace usaf {

// One expert's matrices in the layer's scratch, until the next is decoded.
struct DecodedExpert {
  at::Tensor gate_up;  // [2 * intermediate_size, hidden_size]: rows of gate above rows of up
  at::Tensor down;  // W_down^T [intermediate_size, hidden_size]; a transposed view where a page holds W_down as it is
};

class GpuDecoder {
 public:
  GpuDecoder(const ExpertLayer& layer, at::Device device, void* stream);
  DecodedExpert decode(const ExpertPage& expert) const;

 private:
  void* target(int matrix) const;
  at::Tensor view(int matrix, int64_t count) const;
  void decode_matrices(const uint8_t* page, int first, int count) const;
  void decode_neurons(const RowBank& bank, int64_t first, int64_t count, void* out, const int64_t* out_index) const;
  void overlay(const RowBank* bank, int64_t expert) const;
  void overlay_columns(const RowBank* bank, int64_t expert, const DecodedExpert& decoded) const;
  at::Tensor down_as_it_is(const ExpertPage& expert) const;

  const ExpertLayer& layer_;
  const PageLayout& layout_;
  at::TensorOptions options_;
  void* stream_;
};

// Ascending experts of a group whose tokens' rows stand together in the buffers, micro-batch after micro-batch. An
// expert with too many rows for the buffers is a chunk of its own for some of the micro-batches at a time.
struct Chunk {
  struct Part {
    size_t batch;
    int64_t first_row;   // in the buffers
    int64_t source_row;  // in the micro-batch's permuted order
    int64_t num_rows;
  };
  std::vector<ExpertPage> experts;
  size_t first_batch, end_batch;
  std::vector<Part> parts;  // those with rows
};

// What forward and backward share.
class GpuExperts {
 protected:
  GpuExperts(const ExpertLayer& layer, const MicroBatches& batches, void* stream);

  std::vector<Chunk> chunks(const std::vector<ExpertPage>& group) const;
  at::Tensor buffer(int64_t cols) const;  // [rows of the largest chunk, cols] of the compute dtype
  // The rows of one expert in a part of its chunk, out of a buffer.
  at::Tensor rows(const at::Tensor& buffer, const Chunk::Part& part, int64_t expert) const;
  int64_t num_rows(const Chunk::Part& part, int64_t expert) const;
  void gather(const Chunk::Part& part, const at::Tensor& from, const at::Tensor& to) const;
  // Adds the rows of a part to out, fp32 [num_tokens, hidden_size], by their router weights or (unweighted) as they
  // are.
  void scatter(const Chunk::Part& part, const at::Tensor& from, bool weighted, const at::Tensor& out) const;
  const Routing& routing(const Chunk::Part& part) const { return *batches_[part.batch].routing; }

  const ExpertLayer& layer_;
  const MicroBatches& batches_;
  void* stream_;
  GpuDecoder decoder_;
  int64_t hidden_size_, intermediate_size_;

 private:
  int64_t rows_of(int64_t expert) const;  // in all micro-batches
  std::vector<std::pair<size_t, size_t>> batch_ranges(int64_t expert) const;

  int64_t max_rows_;
};

class GpuForward : GpuExperts {
 public:
  GpuForward(const ExpertLayer& layer, const MicroBatches& batches, void* stream);
  // Adds the outputs of the group's experts to out, fp32 [num_tokens, hidden_size] for each micro-batch.
  void run(const std::vector<ExpertPage>& group, const std::vector<at::Tensor>& out) const;

 private:
  at::Tensor x_, gate_up_, h_, y_;
};

// The sums of squares of a bank's gradient, row by row on the device, as they stand after each micro-batch of one
// backward; see BankNorm (expert_gradients.h).
class GpuBankNorm {
 public:
  GpuBankNorm(const ExpertLayer& layer, size_t num_batches, at::TensorOptions options, void* stream);
  // A micro-batch changed the gradient of these neurons.
  void record(size_t batch, int64_t first_neuron, int64_t num_neurons) const;
  // Writes the last state back to the bank. Returns the sum, in ascending order and fp32, of the micro-batches'
  // increments of the norm: [1].
  at::Tensor finish() const;

 private:
  const RowBank* bank_;
  int64_t hidden_size_;
  at::TensorOptions options_;
  void* stream_;
  std::vector<at::Tensor> after_;  // double [num_neurons * 3], at first the state before; below 0: not recorded
};

class GpuBackward : GpuExperts {
 public:
  GpuBackward(ExpertLayer& layer, const MicroBatches& batches, void* stream);
  // Adds the input gradients to grad_x, fp32 [num_tokens, hidden_size] for each micro-batch, and the gradients of the
  // trained rows to the bank.
  void run(const std::vector<ExpertPage>& group, const std::vector<at::Tensor>& grad_x);
  // When all groups have run: the router weights' gradients, fp32 [num_tokens, top_k], of a micro-batch.
  at::Tensor grad_weights(size_t batch) const;
  at::Tensor grad_anchor() const { return norm_.finish(); }

 private:
  void differentiate(const Chunk& chunk, const ExpertPage& expert, const std::vector<at::Tensor>& row_weights);
  void accumulate_importance(const Chunk::Part& part, int64_t expert) const;
  void accumulate_row_gradients(const Chunk& chunk, const Chunk::Part& part);
  void add_gradients(const Chunk::Part& part, int64_t first_expert, int64_t last_expert) const;

  ExpertLayer& trained_;
  GpuBankNorm norm_;
  at::Tensor x_, grad_y_, gate_up_, grad_gate_up_, grad_h_, weighted_h_, grad_x_;
  std::vector<at::Tensor> grad_row_weights_;  // fp32 [rows] of each micro-batch, in permuted order
};

}  // namespace usaf
#endif

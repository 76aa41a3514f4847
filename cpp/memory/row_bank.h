// The trained neurons of one layer, sorted by (expert, neuron). Holds pointers and the index; the tensors belong to
// Python (usaf_ext/bank.py), which keeps them alive and is the one that saves them.
//
// Neuron i owns three consecutive rows (gate, up, down^T), so every array is [num_neurons, 3, ..].
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../kernel_api.h"

namespace usaf {

struct BankPointers {
  const uint8_t* codes = nullptr;  // [num_neurons, 3, code_bytes]
  const void* absmax = nullptr;    // [num_neurons, 3, num_blocks] of scale_bytes(format) each
  void* grad = nullptr;            // [num_neurons, 3, hidden_size], or null: nothing of this bank is being trained
  DType grad_dtype = DType::f32;   // f32 or bf16
  const int32_t* neuron_expert = nullptr;  // [num_neurons]
  const int32_t* neuron_index = nullptr;   // [num_neurons]
  uint8_t* expert_hit = nullptr;  // [num_experts], on the host: set to 1 where a backward added to grad; or null
  // Sums of squares of grad. CPU: [num_experts], each expert's rows; GPU: [num_neurons, 3], each row.
  double* grad_squares = nullptr;
  // [num_neurons, 3]: where the rows go in the decoded matrices of an expert, [3 * intermediate_size, hidden_size].
  // Only a GPU needs it.
  const int64_t* overlay_rows = nullptr;
};

class RowBank {
 public:
  // `neuron_expert`/`neuron_index` are host copies of the index. Throws std::invalid_argument unless it is sorted,
  // distinct and in range.
  RowBank(Format format, int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
          const std::vector<int32_t>& neuron_expert, const std::vector<int32_t>& neuron_index,
          const BankPointers& pointers);

  int64_t num_neurons() const { return static_cast<int64_t>(index_.size()); }
  // Neurons of `expert` are [first_neuron(expert), first_neuron(expert + 1)).
  int64_t first_neuron(int64_t expert) const { return first_neuron_[static_cast<size_t>(expert)]; }
  const BankPointers& pointers() const { return pointers_; }

  // Where the rows of expert e's neurons go in a decoded matrix [intermediate_size, hidden_size]: their neuron_index.
  const int64_t* row_targets(int64_t expert) const { return index_.data() + first_neuron(expert); }
  // Where they stand in the bank as rows [num_neurons * 3]: 3 * i + matrix.
  const int64_t* bank_rows(int matrix, int64_t expert) const {
    return rows_[static_cast<size_t>(matrix)].data() + first_neuron(expert);
  }

 private:
  std::vector<int64_t> index_, first_neuron_;
  std::vector<int64_t> rows_[3];
  BankPointers pointers_;
};

}  // namespace usaf

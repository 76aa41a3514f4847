#include "row_bank.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "page_layout.h"

namespace usaf {

RowBank::RowBank(Format format, int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
                 const std::vector<int32_t>& neuron_expert, const std::vector<int32_t>& neuron_index,
                 const BankPointers& pointers)
    : pointers_(pointers) {
  if (num_experts < 1 || hidden_size < 1 || intermediate_size < 1) {
    throw std::invalid_argument("RowBank: num_experts, hidden_size and intermediate_size must be at least 1");
  }
  const size_t count = neuron_expert.size();
  if (neuron_index.size() != count) {
    throw std::invalid_argument("RowBank: neuron_expert has " + std::to_string(count) + " entries, neuron_index has " +
                                std::to_string(neuron_index.size()));
  }
  const auto bad_entry = [&](size_t i, const std::string& expected) {
    return std::invalid_argument("RowBank: neuron_expert/neuron_index at " + std::to_string(i) + ": (" +
                                 std::to_string(neuron_expert[i]) + ", " + std::to_string(neuron_index[i]) +
                                 "): " + expected);
  };
  for (size_t i = 0; i < count; ++i) {
    const int32_t expert = neuron_expert[i], neuron = neuron_index[i];
    if (expert < 0 || expert >= num_experts || neuron < 0 || neuron >= intermediate_size) {
      throw bad_entry(i, "there are " + std::to_string(num_experts) + " experts of " +
                             std::to_string(intermediate_size) + " neurons");
    }
    if (i > 0 && std::pair(expert, neuron) <= std::pair(neuron_expert[i - 1], neuron_index[i - 1])) {
      throw bad_entry(i, "expected ascending order, each once");
    }
  }
  if (count > 0 && (pointers.codes == nullptr || pointers.neuron_expert == nullptr ||
                    pointers.neuron_index == nullptr || (num_blocks(format, hidden_size) > 0 && !pointers.absmax))) {
    throw std::invalid_argument("RowBank: codes, absmax, neuron_expert and neuron_index must not be null");
  }
  if (pointers.grad != nullptr && pointers.grad_squares == nullptr) {
    throw std::invalid_argument("RowBank: grad_squares must not be null where there is a gradient");
  }
  if (pointers.grad_dtype != DType::f32 && pointers.grad_dtype != DType::bf16) {
    throw std::invalid_argument("RowBank: grad_dtype: expected 'float32' or 'bfloat16'");
  }

  index_.assign(neuron_index.begin(), neuron_index.end());
  for (int matrix = 0; matrix < kMatricesPerExpert; ++matrix) {
    rows_[matrix].resize(count);
    for (size_t i = 0; i < count; ++i) rows_[matrix][i] = kMatricesPerExpert * static_cast<int64_t>(i) + matrix;
  }
  first_neuron_.resize(static_cast<size_t>(num_experts) + 1);
  for (int64_t expert = 0; expert <= num_experts; ++expert) {
    first_neuron_[static_cast<size_t>(expert)] =
        std::lower_bound(neuron_expert.begin(), neuron_expert.end(), expert) - neuron_expert.begin();
  }
}

}  // namespace usaf

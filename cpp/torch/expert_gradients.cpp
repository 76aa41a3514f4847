#include "expert_gradients.h"

#include <algorithm>
#include <cmath>

#include "row_importance.h"

namespace usaf {

void accumulate_row_gradients(const ExpertLayer& layer, int64_t expert, const ExpertActivations& activations) {
  const RowBank* bank = layer.trained_bank();
  if (bank == nullptr) return;
  const BankPointers& rows = bank->pointers();
  if (rows.expert_hit != nullptr) rows.expert_hit[expert] = 1;
  const int64_t first = bank->first_neuron(expert), count = bank->first_neuron(expert + 1) - first;
  if (count == 0) return;
  const int64_t hidden_size = layer.layout().hidden_size;
  const int32_t offsets[2] = {0, static_cast<int32_t>(activations.num_tokens)};
  void* grad = static_cast<char*>(rows.grad) + first * kMatricesPerExpert * hidden_size * element_size(rows.grad_dtype);
  cpu::row_gradient({activations.x, activations.grad_out, activations.grad_gate_up, activations.weighted_h, offsets,
                     rows.neuron_expert + first, rows.neuron_index + first, grad, count, expert, 1, hidden_size,
                     layer.layout().intermediate_size, layer.dtype(), rows.grad_dtype},
                    nullptr);
  // Row by row first, then rows in ascending order: the bits do not depend on the number of threads.
  std::vector<double> squares(static_cast<size_t>(count * kMatricesPerExpert));
  cpu::squares_of_rows({grad, squares.data(), count * kMatricesPerExpert, hidden_size, rows.grad_dtype}, nullptr);
  double sum = 0.0;
  for (const double square : squares) sum += square;
  rows.grad_squares[expert] = sum;
}

void accumulate_importance(const ExpertLayer& layer, int64_t expert, const ExpertActivations& activations) {
  if (layer.importance == nullptr) return;
  const auto& layout = layer.layout();
  const int32_t offsets[2] = {0, static_cast<int32_t>(activations.num_tokens)};
  row_importance({activations.x, activations.grad_out, activations.grad_gate_up, activations.weighted_h, offsets,
                  layer.importance_metric == ImportanceMetric::gradient_weight ? layer.scratch() : nullptr,
                  layer.importance + expert * layout.intermediate_size, 1, layout.hidden_size, layout.intermediate_size,
                  layer.dtype()},
                 nullptr);
}

BankNorm::BankNorm(const ExpertLayer& layer, size_t num_batches) : squares_(nullptr) {
  const RowBank* bank = layer.trained_bank();
  if (bank == nullptr) return;
  squares_ = bank->pointers().grad_squares;
  after_.assign(1 + num_batches, std::vector<double>(squares_, squares_ + layer.num_experts()));
}

void BankNorm::record(size_t batch, int64_t expert) {
  if (squares_ == nullptr) return;
  for (size_t later = batch + 1; later < after_.size(); ++later) {
    after_[later][static_cast<size_t>(expert)] = squares_[expert];
  }
}

float BankNorm::increment() const {
  if (squares_ == nullptr) return 0.0f;
  const auto norm = [](const std::vector<double>& squares) {
    double sum = 0.0;
    for (const double square : squares) sum += square;
    return std::sqrt(sum);
  };
  float total = 0.0f;
  for (size_t batch = 1; batch < after_.size(); ++batch) {
    total += static_cast<float>(norm(after_[batch]) - norm(after_[batch - 1]));
  }
  return total;
}

}  // namespace usaf

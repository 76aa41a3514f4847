#include "expert_decoder.h"

#include <ATen/ops/from_blob.h>

#include "expert_batches.h"

namespace usaf {

ExpertDecoder::ExpertDecoder(ExpertLayer& layer)
    : layer_(layer), layout_(layer.layout()), options_(at::TensorOptions().dtype(scalar_type(layer.dtype()))) {}

at::Tensor ExpertDecoder::gate_up(const uint8_t* page, int64_t expert) const {
  decode(page, expert, 0, 2);
  return view(0, 2);
}

at::Tensor ExpertDecoder::down(const uint8_t* page, int64_t expert) const {
  decode(page, expert, 2, 1);
  return view(2, 1);
}

void* ExpertDecoder::target(int matrix) const {
  return static_cast<char*>(layer_.scratch()) +
         matrix * layout_.intermediate_size * layout_.hidden_size * element_size(layer_.dtype());
}

at::Tensor ExpertDecoder::view(int matrix, int64_t count) const {
  return at::from_blob(target(matrix), {count * layout_.intermediate_size, layout_.hidden_size}, options_);
}

// `count` matrices in one launch: as one GEMM reads them, so that each thread decodes what it will read.
void ExpertDecoder::decode(const uint8_t* page, int64_t expert, int matrix, int count) const {
  cpu::decode_rows(
      {page + layout_.codes_offset[matrix], page + layout_.absmax_offset[matrix], target(matrix), nullptr, nullptr,
       count * layout_.intermediate_size, layout_.hidden_size, layout_.hidden_size, layout_.format, layer_.dtype()},
      nullptr);
  overlay(layer_.frozen_bank.get(), expert, matrix, count);
  overlay(layer_.bank.get(), expert, matrix, count);
}

void ExpertDecoder::overlay(const RowBank* bank, int64_t expert, int matrix, int count) const {
  if (bank == nullptr) return;
  const BankPointers& rows = bank->pointers();
  for (int overlaid = matrix; overlaid < matrix + count; ++overlaid) {
    cpu::decode_rows({rows.codes, rows.absmax, target(overlaid), bank->bank_rows(overlaid, expert),
                      bank->row_targets(expert), bank->first_neuron(expert + 1) - bank->first_neuron(expert),
                      layout_.hidden_size, layout_.hidden_size, layout_.format, layer_.dtype()},
                     nullptr);
  }
}

}  // namespace usaf

#include "expert_decoder.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "expert_batches.h"

namespace usaf {
namespace {

constexpr int64_t kDown = 2;
constexpr int64_t kColumnsAtOnce = 64;  // bounds the rows that are decoded beside the scratch

}  // namespace

ExpertDecoder::ExpertDecoder(ExpertLayer& layer)
    : layer_(layer), layout_(layer.layout()), options_(at::TensorOptions().dtype(scalar_type(layer.dtype()))) {}

at::Tensor ExpertDecoder::gate_up(const uint8_t* page, int64_t expert) const {
  decode(page, expert, 0, 2);
  return view(0, 2);
}

at::Tensor ExpertDecoder::down(const uint8_t* page, int64_t expert) const {
  if (layout_.down_axis == DownAxis::intermediate) return down_as_it_is(page, expert);
  decode(page, expert, kDown, 1);
  return view(kDown, 1);
}

at::Tensor ExpertDecoder::down_as_it_is(const uint8_t* page, int64_t expert) const {
  cpu::decode_rows(
      {page + layout_.codes_offset[kDown], page + layout_.absmax_offset[kDown], target(kDown), nullptr, nullptr,
       layout_.rows[kDown], layout_.cols[kDown], layout_.cols[kDown], layout_.format, layer_.dtype()},
      nullptr);
  const at::Tensor down = at::from_blob(target(kDown), {layout_.rows[kDown], layout_.cols[kDown]}, options_).t();
  overlay_columns(layer_.frozen_bank.get(), expert, down);
  overlay_columns(layer_.bank.get(), expert, down);
  if (layer_.importance == nullptr || layer_.importance_metric != ImportanceMetric::gradient_weight) return down;
  return view(kDown, 1).copy_(down.contiguous());
}

// Bank rows of down^T [intermediate_size, hidden_size] are columns of what was decoded.
void ExpertDecoder::overlay_columns(const RowBank* bank, int64_t expert, const at::Tensor& down) const {
  if (bank == nullptr) return;
  const BankPointers& rows = bank->pointers();
  const int64_t count = bank->first_neuron(expert + 1) - bank->first_neuron(expert);
  for (int64_t first = 0; first < count; first += kColumnsAtOnce) {
    const int64_t num_rows = std::min(kColumnsAtOnce, count - first);
    const at::Tensor decoded = at::empty({num_rows, layout_.hidden_size}, options_);
    cpu::decode_rows({rows.codes, rows.absmax, decoded.mutable_data_ptr(), bank->bank_rows(kDown, expert) + first,
                      nullptr, num_rows, layout_.hidden_size, layout_.hidden_size, layout_.format, layer_.dtype()},
                     nullptr);
    const at::Tensor neurons = at::from_blob(const_cast<int64_t*>(bank->row_targets(expert) + first), {num_rows},
                                             at::TensorOptions().dtype(at::kLong));
    down.index_copy_(0, neurons, decoded);
  }
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

#include "expert_gpu.h"

#ifdef USAF_WITH_GPU
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <utility>

namespace usaf {
namespace {

using at::Tensor;

constexpr int kDown = 2;
constexpr int64_t kColumnsAtOnce = 64;  // bounds the rows that are decoded beside the scratch
// Rows of a chunk, unless one expert has more in one micro-batch: 16 MB of a hidden state of 2048 in bf16.
constexpr int64_t kChunkRows = 4096;

}  // namespace

GpuDecoder::GpuDecoder(const ExpertLayer& layer, at::Device device, void* stream)
    : layer_(layer),
      layout_(layer.layout()),
      options_(at::TensorOptions().dtype(scalar_type(layer.dtype())).device(device)),
      stream_(stream) {}

DecodedExpert GpuDecoder::decode(const ExpertPage& expert) const {
  if (layout_.down_axis == DownAxis::intermediate) {
    decode_matrices(expert.page, 0, 2);
    DecodedExpert decoded{view(0, 2), down_as_it_is(expert)};
    overlay_columns(layer_.frozen_bank.get(), expert.expert, decoded);
    overlay_columns(layer_.bank.get(), expert.expert, decoded);
    if (layer_.importance != nullptr && layer_.importance_metric == ImportanceMetric::gradient_weight) {
      decoded.down = view(kDown, 1).copy_(decoded.down.contiguous());
    }
    return decoded;
  }
  decode_matrices(expert.page, 0, kMatricesPerExpert);
  overlay(layer_.frozen_bank.get(), expert.expert);
  overlay(layer_.bank.get(), expert.expert);
  return {view(0, 2), view(kDown, 1)};
}

void* GpuDecoder::target(int matrix) const {
  return static_cast<char*>(layer_.scratch()) +
         matrix * layout_.intermediate_size * layout_.hidden_size * element_size(layer_.dtype());
}

Tensor GpuDecoder::view(int matrix, int64_t count) const {
  return at::for_blob(target(matrix), {count * layout_.intermediate_size, layout_.hidden_size})
      .options(options_)
      .target_device(options_.device())
      .make_tensor();
}

// Matrices of the same shape, whose codes and scales follow each other in the page.
void GpuDecoder::decode_matrices(const uint8_t* page, int first, int count) const {
  gpu::decode_rows(
      {page + layout_.codes_offset[first], page + layout_.absmax_offset[first], target(first), nullptr, nullptr,
       count * layout_.rows[first], layout_.cols[first], layout_.cols[first], layout_.format, layer_.dtype()},
      stream_);
}

// The rows of neurons [first, first + count) of a bank; `out_index`: where they go in `out`, or null.
void GpuDecoder::decode_neurons(const RowBank& bank, int64_t first, int64_t count, void* out,
                                const int64_t* out_index) const {
  const Format format = layout_.format;
  const int64_t first_row = kMatricesPerExpert * first, hidden_size = layout_.hidden_size;
  const char* absmax = static_cast<const char*>(bank.pointers().absmax);
  gpu::decode_rows({bank.pointers().codes + first_row * code_bytes(format, hidden_size),
                    absmax + first_row * num_blocks(format, hidden_size) * scale_bytes(format), out, nullptr, out_index,
                    kMatricesPerExpert * count, hidden_size, hidden_size, format, layer_.dtype()},
                   stream_);
}

void GpuDecoder::overlay(const RowBank* bank, int64_t expert) const {
  if (bank == nullptr) return;
  const int64_t first = bank->first_neuron(expert), count = bank->first_neuron(expert + 1) - first;
  if (count == 0) return;
  decode_neurons(*bank, first, count, layer_.scratch(), bank->pointers().overlay_rows + kMatricesPerExpert * first);
}

// Where W_down stands as it is, the banks' rows of W_down^T are its columns.
Tensor GpuDecoder::down_as_it_is(const ExpertPage& expert) const {
  decode_matrices(expert.page, kDown, 1);
  return view(kDown, 1).view({layout_.rows[kDown], layout_.cols[kDown]}).t();
}

void GpuDecoder::overlay_columns(const RowBank* bank, int64_t expert, const DecodedExpert& decoded) const {
  if (bank == nullptr) return;
  const int64_t hidden_size = layout_.hidden_size, end = bank->first_neuron(expert + 1);
  for (int64_t first = bank->first_neuron(expert); first < end; first += kColumnsAtOnce) {
    const int64_t count = std::min(kColumnsAtOnce, end - first);
    const Tensor values = at::empty({count, kMatricesPerExpert, hidden_size}, options_);
    decode_neurons(*bank, first, count, values.mutable_data_ptr(), nullptr);
    const int64_t* overlay_rows = bank->pointers().overlay_rows + kMatricesPerExpert * first;
    const Tensor targets = at::for_blob(const_cast<int64_t*>(overlay_rows), {count, kMatricesPerExpert})
                               .options(options_.dtype(at::kLong))
                               .target_device(options_.device())
                               .make_tensor();
    decoded.gate_up.index_copy_(0, targets.narrow(1, 0, 2).reshape(-1),
                                values.narrow(1, 0, 2).reshape({-1, hidden_size}));
    decoded.down.index_copy_(0, targets.select(1, kDown).sub(kDown * layout_.intermediate_size),
                             values.select(1, kDown));
  }
}

GpuExperts::GpuExperts(const ExpertLayer& layer, const MicroBatches& batches, void* stream)
    : layer_(layer),
      batches_(batches),
      stream_(stream),
      decoder_(layer, batches[0].x.device(), stream),
      hidden_size_(layer.layout().hidden_size),
      intermediate_size_(layer.layout().intermediate_size) {
  int64_t all = 0;
  for (const int64_t expert : batches.experts()) all += rows_of(expert);
  max_rows_ = std::min(all, std::max(batches.max_tokens(), kChunkRows));
}

int64_t GpuExperts::rows_of(int64_t expert) const {
  int64_t rows = 0;
  for (const MicroBatch& batch : batches_) rows += batch.routing->tokens(expert);
  return rows;
}

std::vector<Chunk> GpuExperts::chunks(const std::vector<ExpertPage>& group) const {
  std::vector<Chunk> result;
  int64_t num_rows = max_rows_;  // of the last chunk; the next row begins another
  for (const ExpertPage& expert : group) {
    const int64_t more = rows_of(expert.expert);
    if (more > max_rows_) {
      for (const auto& [first, end] : batch_ranges(expert.expert)) result.push_back({{expert}, first, end, {}});
      num_rows = max_rows_;
      continue;
    }
    if (num_rows + more > max_rows_) {
      result.push_back({{}, 0, batches_.size(), {}});
      num_rows = 0;
    }
    result.back().experts.push_back(expert);
    num_rows += more;
  }
  for (Chunk& chunk : result) {
    int64_t row = 0;
    for (size_t batch = chunk.first_batch; batch < chunk.end_batch; ++batch) {
      const Routing& routing = *batches_[batch].routing;
      const int64_t source_row = routing.first_row(chunk.experts.front().expert);
      const int64_t rows = routing.first_row(chunk.experts.back().expert + 1) - source_row;
      if (rows > 0) chunk.parts.push_back({batch, row, source_row, rows});
      row += rows;
    }
  }
  return result;
}

// Micro-batches [first, end) in which an expert has no more rows than a chunk takes.
std::vector<std::pair<size_t, size_t>> GpuExperts::batch_ranges(int64_t expert) const {
  std::vector<std::pair<size_t, size_t>> ranges;
  int64_t num_rows = max_rows_;
  for (size_t batch = 0; batch < batches_.size(); ++batch) {
    const int64_t more = batches_[batch].routing->tokens(expert);
    if (num_rows + more > max_rows_) {
      ranges.emplace_back(batch, batch);
      num_rows = 0;
    }
    ranges.back().second = batch + 1;
    num_rows += more;
  }
  return ranges;
}

Tensor GpuExperts::buffer(int64_t cols) const { return at::empty({max_rows_, cols}, batches_[0].x.options()); }

int64_t GpuExperts::num_rows(const Chunk::Part& part, int64_t expert) const { return routing(part).tokens(expert); }

Tensor GpuExperts::rows(const Tensor& buffer, const Chunk::Part& part, int64_t expert) const {
  return buffer.narrow(0, part.first_row + routing(part).first_row(expert) - part.source_row, num_rows(part, expert));
}

void GpuExperts::gather(const Chunk::Part& part, const Tensor& from, const Tensor& to) const {
  const Routing& routing = this->routing(part);
  gpu::gather_rows({from.const_data_ptr(), routing.source().const_data_ptr<int32_t>() + part.source_row,
                    to.narrow(0, part.first_row, part.num_rows).mutable_data_ptr(), part.num_rows, hidden_size_,
                    routing.top_k(), layer_.dtype()},
                   stream_);
}

void GpuExperts::scatter(const Chunk::Part& part, const Tensor& from, bool weighted, const Tensor& out) const {
  const Routing& routing = this->routing(part);
  const MicroBatch& batch = batches_[part.batch];
  gpu::scatter_add_rows(
      {from.narrow(0, part.first_row, part.num_rows).const_data_ptr(),
       routing.source().const_data_ptr<int32_t>() + part.source_row, routing.inverse().const_data_ptr<int32_t>(),
       weighted ? batch.weights.const_data_ptr() : nullptr, out.mutable_data_ptr<float>(), part.num_rows,
       part.source_row, hidden_size_, routing.top_k(), layer_.dtype(), DType::f32},
      stream_);
}

GpuForward::GpuForward(const ExpertLayer& layer, const MicroBatches& batches, void* stream)
    : GpuExperts(layer, batches, stream),
      x_(buffer(hidden_size_)),
      gate_up_(buffer(2 * intermediate_size_)),
      h_(buffer(intermediate_size_)),
      y_(buffer(hidden_size_)) {}

void GpuForward::run(const std::vector<ExpertPage>& group, const std::vector<Tensor>& out) const {
  for (const Chunk& chunk : chunks(group)) {
    for (const Chunk::Part& part : chunk.parts) gather(part, batches_[part.batch].x, x_);
    for (const ExpertPage& expert : chunk.experts) {
      const DecodedExpert weight = decoder_.decode(expert);
      for (const Chunk::Part& part : chunk.parts) {
        if (num_rows(part, expert.expert) == 0) continue;
        Tensor gate_up = rows(gate_up_, part, expert.expert), y = rows(y_, part, expert.expert);
        const Tensor h = rows(h_, part, expert.expert);
        at::mm_out(gate_up, rows(x_, part, expert.expert), weight.gate_up.t());
        gpu::glu({gate_up.const_data_ptr(), nullptr, h.mutable_data_ptr(), h.size(0), intermediate_size_, false,
                  layer_.activation(), layer_.dtype()},
                 stream_);
        at::mm_out(y, h, weight.down);
      }
    }
    for (const Chunk::Part& part : chunk.parts) scatter(part, y_, /*weighted=*/true, out[part.batch]);
  }
}

}  // namespace usaf
#endif

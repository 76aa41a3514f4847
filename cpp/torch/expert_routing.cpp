#include "expert_routing.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "backend.h"

namespace usaf {
namespace {

using at::Tensor;

Tensor int32_like(const Tensor& index, at::IntArrayRef sizes) {
  return at::empty(sizes, index.options().dtype(at::kInt));
}

// Layers may be called by several threads, one at a time; a deleter of tensors may run in any.
std::mutex& kept_mutex() {
  static std::mutex mutex;
  return mutex;
}

#ifdef USAF_WITH_GPU
void read_counts(ExpertLayer& layer, const std::vector<Tensor>& index, const std::vector<std::shared_ptr<Routing>>& to,
                 Phase phase, void* stream) {
  HostReadback& readback = layer.sweep().readback();
  const int64_t entries = layer.num_experts() + 1, bytes = entries * static_cast<int64_t>(sizeof(int32_t));
  readback.reserve(bytes * static_cast<int64_t>(to.size()));
  int64_t num_pairs = 0;
  for (size_t i = 0; i < to.size(); ++i) {
    num_pairs += index[i].numel();
    const int64_t num_chunks = num_sort_chunks(index[i].numel());
    const Tensor counts = int32_like(index[i], {num_chunks, layer.num_experts()});
    const Tensor contiguous = index[i].contiguous();
    gpu::sort_by_expert(to[i]->sort_arguments(contiguous, counts.mutable_data_ptr<int32_t>()), stream);
    readback.copy(static_cast<int64_t>(i) * bytes, to[i]->offsets().const_data_ptr(), bytes, stream);
  }
  readback.finish(stream);
  if (phase != Phase::backward && is_dense(num_pairs, layer.num_experts()))
    layer.sweep().announce(layer.layer(), phase);
  const auto* offsets = reinterpret_cast<const int32_t*>(readback.wait());
  for (size_t i = 0; i < to.size(); ++i) to[i]->set_counts(offsets + static_cast<int64_t>(i) * entries);
}
#endif

}  // namespace

Routing::Routing(const Tensor& index, int64_t num_experts)
    : offsets_(int32_like(index, {num_experts + 1})),
      source_(int32_like(index, {index.numel()})),
      inverse_(int32_like(index, index.sizes())) {}

SortByExpertArgs Routing::sort_arguments(const Tensor& index, int32_t* counts) const {
  return {index.const_data_ptr<int64_t>(),
          offsets_.mutable_data_ptr<int32_t>(),
          source_.mutable_data_ptr<int32_t>(),
          inverse_.mutable_data_ptr<int32_t>(),
          counts,
          index.size(0),
          index.size(1),
          num_experts()};
}

void Routing::set_counts(const int32_t* offsets) {
  first_rows_.assign(offsets, offsets + num_experts() + 1);
  tokens_.clear();
  for (size_t i = 1; i < first_rows_.size(); ++i) tokens_.push_back(first_rows_[i] - first_rows_[i - 1]);
}

bool KeptRoutings::Entry::is_of(const Tensor& index) const {
  return storage.lock().get() == index.storage().unsafeGetStorageImpl() && storage_offset == index.storage_offset() &&
         index.sizes() == sizes && index.strides() == strides;
}

std::shared_ptr<const Routing> KeptRoutings::find(const Tensor& index) const {
  if (index.is_inference()) return nullptr;
  const std::lock_guard lock(kept_mutex());
  for (const Entry& entry : entries_) {
    if (entry.is_of(index) && entry.version == index._version()) return entry.routing;
  }
  return nullptr;
}

void KeptRoutings::keep(const Tensor& index, std::shared_ptr<const Routing> routing) {
  if (index.is_inference()) return;  // it has no version, and no backward
  const std::lock_guard lock(kept_mutex());
  std::erase_if(entries_, [&](const Entry& entry) { return entry.storage.expired() || entry.is_of(index); });
  entries_.push_back({index.storage().getWeakStorageImpl(), index.storage_offset(), index.sizes().vec(),
                      index.strides().vec(), index._version(), std::move(routing)});
}

Routings sorted_routings(ExpertLayer& layer, const std::vector<Tensor>& index, Phase phase) {
  std::vector<std::shared_ptr<Routing>> made;
  for (const Tensor& one : index) made.push_back(std::make_shared<Routing>(one, layer.num_experts()));
  if (index[0].is_cpu()) {
    for (size_t i = 0; i < made.size(); ++i) {
      const Tensor contiguous = index[i].contiguous();
      cpu::sort_by_expert(made[i]->sort_arguments(contiguous, nullptr), nullptr);
      made[i]->set_counts(made[i]->offsets().const_data_ptr<int32_t>());
    }
  } else {
#ifdef USAF_WITH_GPU
    try {
      read_counts(layer, index, made, phase, GpuBackend::Guard(index[0]).stream());
    } catch (...) {
      layer.sweep().reset();
      throw;
    }
#endif
  }
  if (phase == Phase::inference) return {made.begin(), made.end()};  // no backward follows
  if (!layer.kept_routings) layer.kept_routings = std::make_shared<KeptRoutings>();
  for (size_t i = 0; i < made.size(); ++i) layer.kept_routings->keep(index[i], made[i]);
  return {made.begin(), made.end()};
}

Routings kept_routings(ExpertLayer& layer, const std::vector<Tensor>& index) {
  Routings routings;
  for (const Tensor& one : index) {
    routings.push_back(layer.kept_routings ? layer.kept_routings->find(one) : nullptr);
    if (!routings.back()) return sorted_routings(layer, index, Phase::backward);
  }
  return routings;
}

}  // namespace usaf

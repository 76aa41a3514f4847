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
                 bool announce, Phase phase, void* stream) {
  HostReadback& readback = layer.sweep().readback();
  const int64_t entries = layer.num_experts() + 1, bytes = entries * static_cast<int64_t>(sizeof(int32_t));
  readback.reserve(bytes * static_cast<int64_t>(to.size()));
  for (size_t i = 0; i < to.size(); ++i) {
    const int64_t num_chunks = num_sort_chunks(index[i].numel());
    const Tensor counts = int32_like(index[i], {num_chunks, layer.num_experts()});
    gpu::sort_by_expert(to[i]->sort_arguments(index[i], counts.mutable_data_ptr<int32_t>()), stream);
    readback.copy(static_cast<int64_t>(i) * bytes, to[i]->offsets().const_data_ptr(), bytes, stream);
  }
  readback.finish(stream);
  if (announce) layer.sweep().announce(layer.layer(), phase);
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

std::shared_ptr<const Routing> KeptRoutings::find(const Tensor& index) const {
  if (index.is_inference()) return nullptr;
  const std::lock_guard lock(kept_mutex());
  for (const Entry& entry : entries_) {
    const auto storage = entry.storage.lock();
    if (storage.get() == index.storage().unsafeGetStorageImpl() && entry.storage_offset == index.storage_offset() &&
        index.sizes() == entry.sizes && index.is_contiguous() && entry.version == index._version()) {
      return entry.routing;
    }
  }
  return nullptr;
}

void KeptRoutings::keep(const Tensor& index, std::shared_ptr<const Routing> routing) {
  if (index.is_inference()) return;  // it has no version, and no backward
  const std::lock_guard lock(kept_mutex());
  std::erase_if(entries_, [](const Entry& entry) { return entry.storage.expired(); });
  entries_.push_back({index.storage().getWeakStorageImpl(), index.storage_offset(), index.sizes().vec(),
                      index._version(), std::move(routing)});
}

Routings route(ExpertLayer& layer, const std::vector<Tensor>& index, [[maybe_unused]] Phase phase) {
  if (!layer.kept_routings) layer.kept_routings = std::make_shared<KeptRoutings>();
  KeptRoutings& kept = *layer.kept_routings;
  Routings routings;
  std::vector<Tensor> new_index;
  std::vector<std::shared_ptr<Routing>> made;
  std::vector<size_t> places;
  int64_t num_pairs = 0;
  for (const Tensor& one : index) {
    num_pairs += one.numel();
    routings.push_back(kept.find(one));
    if (routings.back()) continue;
    made.push_back(std::make_shared<Routing>(one, layer.num_experts()));
    new_index.push_back(one);
    places.push_back(routings.size() - 1);
  }
  if (made.empty()) return routings;
  if (index[0].is_cpu()) {
    for (size_t i = 0; i < made.size(); ++i) {
      cpu::sort_by_expert(made[i]->sort_arguments(new_index[i], nullptr), nullptr);
      made[i]->set_counts(made[i]->offsets().const_data_ptr<int32_t>());
    }
  } else {
#ifdef USAF_WITH_GPU
    const bool announce = phase != Phase::backward && is_dense(num_pairs, layer.num_experts());
    try {
      read_counts(layer, new_index, made, announce, phase, GpuBackend::Guard(index[0]).stream());
    } catch (...) {
      layer.sweep().reset();
      throw;
    }
#endif
  }
  for (size_t i = 0; i < made.size(); ++i) {
    routings[places[i]] = made[i];
    kept.keep(new_index[i], made[i]);
  }
  return routings;
}

}  // namespace usaf

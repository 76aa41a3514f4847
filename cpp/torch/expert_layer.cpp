#include "expert_layer.h"

#include <cmath>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

namespace usaf {
namespace {

struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, ExpertLayer*> layers;
  int64_t next = 1;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

ExpertLayer::ExpertLayer(std::shared_ptr<ExpertSweep> sweep, int64_t layer, Activation activation, DType dtype,
                         void* scratch)
    : sweep_(std::move(sweep)), layer_(layer), handle_(0), activation_(activation), dtype_(dtype), scratch_(scratch) {
  if (layer < 0 || layer >= store().num_layers()) {
    throw std::invalid_argument("layer: expected 0 to " + std::to_string(store().num_layers() - 1) + ", got " +
                                std::to_string(layer));
  }
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  handle_ = all.next++;
  all.layers[handle_] = this;
}

ExpertLayer::~ExpertLayer() {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.layers.erase(handle_);
}

void ExpertLayer::set_threshold(double alpha, const int64_t* counts) {
  if (!(std::isfinite(alpha) && alpha >= 0.0)) {
    throw std::invalid_argument("alpha: expected a finite number of at least 0, got " + std::to_string(alpha));
  }
  threshold_alpha_ = alpha;
  threshold_counts_ = counts;
}

bool ExpertLayer::under_threshold(int64_t expert, const std::vector<int64_t>& tokens) const {
  if (threshold_alpha_ == 0.0) return false;
  const int64_t* counts = threshold_counts_ != nullptr ? threshold_counts_ : tokens.data();
  const double sum = static_cast<double>(std::accumulate(counts, counts + num_experts(), int64_t{0}));
  return static_cast<double>(counts[expert]) < threshold_alpha_ * (sum / static_cast<double>(num_experts()));
}

ExpertLayer* ExpertLayer::find(int64_t handle) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.layers.find(handle);
  return found == all.layers.end() ? nullptr : found->second;
}

}  // namespace usaf

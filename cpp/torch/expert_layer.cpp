#include "expert_layer.h"

#include <mutex>
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

ExpertLayer* ExpertLayer::find(int64_t handle) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.layers.find(handle);
  return found == all.layers.end() ? nullptr : found->second;
}

}  // namespace usaf

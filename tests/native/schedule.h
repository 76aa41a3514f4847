// The expert layers' schedule on the virtual device: the real pager and sweep, with durations for kernels. The pages
// are small and hold their own number, so that each kernel sees whether it reads the page it should.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "forgetful_device.h"
#include "memory/expert_sweep.h"
#include "virtual_device.h"

namespace usaf {

struct Sizes {
  int64_t num_layers, num_experts, num_slots;
};

inline std::shared_ptr<ExpertStore> make_numbered_store(const Sizes& sizes) {
  auto store = std::make_shared<ExpertStore>(sizes.num_layers, sizes.num_experts, make_page_layout(Format::nf4, 64, 8));
  for (int64_t page = 0; page < sizes.num_layers * sizes.num_experts; ++page) {
    auto* words = reinterpret_cast<int64_t*>(store->writable_page(page / sizes.num_experts, page % sizes.num_experts));
    std::fill(words, words + store->layout().page_bytes / 8, page);
  }
  store->seal();
  return store;
}

// One MoE layer: what is launched before its experts, for each of them, and after them.
struct LayerWork {
  double before_seconds = 0, after_seconds = 0;
  int64_t before_calls = 1, after_calls = 1, expert_calls = 1;
  const int64_t* tokens = nullptr;         // [num_experts]
  const double* expert_seconds = nullptr;  // [num_experts]
};

class Schedule {
 public:
  Schedule(const Sizes& sizes, std::shared_ptr<ExpertStore> store, const VirtualRates& rates, Effects effects,
           Fault fault = Fault::none, int64_t which = -1)
      : device_(std::make_shared<VirtualDevice>(rates, effects)), store_(std::move(store)) {
    const int64_t slab_bytes = sizes.num_slots * store_->layout().page_bytes;
    slab_.reset(static_cast<uint8_t*>(std::aligned_alloc(4096, static_cast<size_t>(slab_bytes))));
    std::memset(slab_.get(), kPoison, static_cast<size_t>(slab_bytes));
    if (which >= 0) {
      forgetful_ = std::make_shared<ForgetfulDevice>(device_, fault, which);
      driven_ = forgetful_;
      compute_ = forgetful_->compute_stream();
    } else {
      driven_ = device_;
      compute_ = device_->create_stream();
    }
    counts_ = driven_->create_event();
    pager_ = std::make_shared<ExpertPager>(driven_, store_, slab_.get(), sizes.num_slots);
    sweep_ = std::make_unique<ExpertSweep>(pager_);
  }

  // As the expert layer does: a forward needs the tokens per expert on the host, a backward has them.
  void run_layer(int64_t layer, Phase phase, const LayerWork& work) {
    device_->launch(compute_, work.before_seconds, work.before_calls, layer, [] {});
    if (phase != Phase::backward) {
      driven_->record(counts_, compute_);
      driven_->synchronize(counts_);
    }
    std::vector<int64_t> routed;
    int64_t num_pairs = 0;
    for (int64_t expert = 0; expert < store_->num_experts(); ++expert) {
      num_pairs += work.tokens[expert];
      if (work.tokens[expert] > 0) routed.push_back(expert);
    }
    const bool dense = is_dense(num_pairs, store_->num_experts());
    sweep_->for_each_expert(layer, routed, dense, phase, compute_, [&](const uint8_t* page, int64_t expert) {
      if (forgetful_) forgetful_->read(page);
      const uint8_t* expected = store_->page(layer, expert);
      const int64_t copies = device_->copies_to(page).queued;
      device_->launch(compute_, work.expert_seconds[expert], work.expert_calls, layer, [=, this] {
        const bool same = std::memcmp(page, expected, static_cast<size_t>(store_->layout().page_bytes)) == 0;
        wrong_reads_ += !same || device_->copies_to(page).done != copies;
      });
    });
    device_->launch(compute_, work.after_seconds, work.after_calls, layer, [] {});
  }

  // Kernels outside the layers.
  void launch(double seconds, int64_t calls) {
    device_->launch(compute_, seconds, calls, store_->num_layers(), [] {});
  }

  VirtualDevice& device() { return *device_; }
  double compute_end() const { return device_->end_of(compute_); }
  PagerStats stats() const { return pager_->stats(); }
  const ExpertStore& store() const { return *store_; }
  bool planted() const { return forgetful_ && forgetful_->planted(); }
  // Kernels so far, all that are queued included, that read something else than their page.
  int64_t wrong_reads() {
    device_->finish();
    return wrong_reads_;
  }

 private:
  std::shared_ptr<VirtualDevice> device_;
  std::shared_ptr<ForgetfulDevice> forgetful_;  // or null
  std::shared_ptr<Device> driven_;              // either of them
  std::shared_ptr<ExpertStore> store_;
  std::unique_ptr<uint8_t, decltype(&std::free)> slab_{nullptr, &std::free};
  Device::Stream compute_ = nullptr;
  Device::Event counts_ = nullptr;
  int64_t wrong_reads_ = 0;
  std::shared_ptr<ExpertPager> pager_;
  std::unique_ptr<ExpertSweep> sweep_;
};

}  // namespace usaf

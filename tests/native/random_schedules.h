// Random schedules on the virtual device: sizes, budgets, routing with empty experts, rates and sweeps are all drawn.
#pragma once
#include <random>

#include "schedule.h"

namespace usaf {

class RandomSchedule {
 public:
  explicit RandomSchedule(uint64_t seed) : draw_(seed) {
    sizes_ = {uniform(1, 5), uniform(1, 8), 0};
    sizes_.num_slots = uniform(2, std::max<int64_t>(2, sizes_.num_layers * sizes_.num_experts));
    rates_ = {seconds(), 0.1 * seconds(), 0.1 * seconds(), seconds(), uniform(1, 200)};
    which_ = uniform(0, 9);
    const int64_t num_sweeps = uniform(1, 4);
    for (int64_t i = 0; i < num_sweeps; ++i) {
      if (uniform(0, 3) == 0) {
        add_sweep(Phase::inference);
      } else {
        add_sweep(Phase::training_forward);
        add_sweep(Phase::backward);
      }
    }
  }

  struct Outcome {
    bool planted;
    int64_t wrong_reads;
  };

  // With `perfect` no wait is kept back.
  Outcome run(Effects effects, bool perfect, Fault fault) const {
    Schedule schedule(sizes_, make_numbered_store(sizes_), rates_, effects, fault, perfect ? -1 : which_);
    for (const Call& call : calls_) {
      LayerWork work = call.work;
      work.tokens = call.tokens.data();
      work.expert_seconds = call.seconds.data();
      schedule.run_layer(call.layer, call.phase, work);
    }
    const int64_t wrong_reads = schedule.wrong_reads();
    return {schedule.planted(), wrong_reads};
  }

 private:
  struct Call {
    int64_t layer;
    Phase phase;
    std::vector<int64_t> tokens;
    std::vector<double> seconds;
    LayerWork work;
  };

  int64_t uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(draw_); }
  double seconds() { return std::exponential_distribution<double>(1.0)(draw_); }

  void add_sweep(Phase phase) {
    if (phase != Phase::backward) route();
    for (int64_t i = 0; i < sizes_.num_layers; ++i) {
      const int64_t layer = phase == Phase::backward ? sizes_.num_layers - 1 - i : i;
      Call call{layer, phase, tokens_[static_cast<size_t>(layer)], {}, {}};
      for (int64_t expert = 0; expert < sizes_.num_experts; ++expert) call.seconds.push_back(seconds());
      call.work.before_seconds = seconds();
      call.work.after_seconds = seconds();
      if (uniform(0, 15) == 0) calls_.push_back(call);  // a caller may come back to a layer
      calls_.push_back(std::move(call));
    }
  }

  // Tokens per expert for each layer: about a third of the experts have none, every other batch is a small one.
  void route() {
    tokens_.assign(static_cast<size_t>(sizes_.num_layers), {});
    const int64_t most = uniform(0, 1) == 0 ? 4 : 40;
    for (auto& layer : tokens_) {
      for (int64_t expert = 0; expert < sizes_.num_experts; ++expert) {
        layer.push_back(uniform(0, 2) == 0 ? 0 : uniform(1, most));
      }
    }
  }

  std::mt19937_64 draw_;
  Sizes sizes_{};
  VirtualRates rates_;
  int64_t which_;
  std::vector<std::vector<int64_t>> tokens_;  // of the latest forward
  std::vector<Call> calls_;
};

}  // namespace usaf

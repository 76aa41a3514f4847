#include "expert_sweep.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "../errors.h"

namespace usaf {

ExpertSweep::ExpertSweep(std::shared_ptr<ExpertPager> pager)
    : pager_(std::move(pager)),
      used_(static_cast<size_t>(pager_->store().num_layers())),
      readback_(pager_->shared_device()),
      order_(pager_->shared_device()) {}

std::vector<int64_t> ExpertSweep::all_experts() const {
  std::vector<int64_t> experts(static_cast<size_t>(pager_->store().num_experts()));
  std::iota(experts.begin(), experts.end(), int64_t{0});
  return experts;
}

void ExpertSweep::drop_queued() {
  for (const Queued& queued : queued_) {
    for (auto ticket : queued.tickets) pager_->cancel(ticket);
  }
  queued_.clear();
}

// A sweep of a training step begins with layers that the one before it left on the device. The pages that come into
// their slots belong to layers far ahead; queued early, their copies run beside the computation of the first layers,
// too. But what is queued far ahead takes a layer's slots as soon as it is done: not for callers that come back to it.
int64_t ExpertSweep::layers_ahead(Phase phase) const {
  if (phase == Phase::inference || repeats_layers_) return 1;
  return std::max<int64_t>(1, pager_->num_slots() / pager_->store().num_experts());
}

std::vector<ExpertPager::Ticket> ExpertSweep::begin(int64_t layer, const std::vector<int64_t>& experts, bool dense,
                                                    Phase phase) {
  const int64_t num_layers = pager_->store().num_layers();
  if (phase != Phase::inference && phase == latest_phase_ && layer == latest_layer_) repeats_layers_ = true;
  latest_phase_ = phase;
  latest_layer_ = layer;
  std::vector<ExpertPager::Ticket> tickets;
  const bool covered =
      !queued_.empty() && queued_.front().layer == layer &&
      std::includes(queued_.front().experts.begin(), queued_.front().experts.end(), experts.begin(), experts.end());
  if (covered) {
    tickets = std::move(queued_.front().tickets);
    queued_.pop_front();
  } else {
    drop_queued();
    tickets = pager_->prefetch(layer, experts, phase);
  }
  if (phase != Phase::backward) used_[static_cast<size_t>(layer)] = experts;

  const int64_t step = phase == Phase::backward ? -1 : 1;
  for (int64_t count = static_cast<int64_t>(queued_.size()); count < layers_ahead(phase); ++count) {
    const int64_t next = layer + (count + 1) * step;
    if (next < 0 || next >= num_layers) break;
    std::vector<int64_t> ahead;
    if (phase == Phase::backward) {
      ahead = used_[static_cast<size_t>(next)];
    } else if (dense) {
      ahead = all_experts();
    }
    if (ahead.empty()) break;
    auto ahead_tickets = pager_->prefetch(next, ahead, phase);
    queued_.push_back({next, std::move(ahead_tickets), std::move(ahead)});
  }
  return tickets;
}

void ExpertSweep::announce(int64_t layer, Phase phase) {
  std::vector<int64_t> experts = all_experts();
  if (!queued_.empty() && queued_.front().layer == layer && queued_.front().experts == experts) return;
  drop_queued();
  auto tickets = pager_->prefetch(layer, experts, phase);
  queued_.push_back({layer, std::move(tickets), std::move(experts)});
}

void ExpertSweep::reset() {
  failure_ = std::current_exception();
  queued_.clear();
  latest_layer_ = -1;  // which may be tried again
  pager_->reset();
}

void ExpertSweep::rethrow_failure(const std::string& text) {
  const std::exception_ptr failure = std::exchange(failure_, nullptr);
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const Error& error) {
    if (text.find(error.what()) != std::string::npos) throw;
  } catch (...) {
  }
}

}  // namespace usaf

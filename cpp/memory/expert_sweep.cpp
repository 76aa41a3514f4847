#include "expert_sweep.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "../errors.h"

namespace usaf {

ExpertSweep::ExpertSweep(std::shared_ptr<ExpertPager> pager)
    : pager_(std::move(pager)), used_(static_cast<size_t>(pager_->store().num_layers())) {}

void ExpertSweep::drop_queued() {
  for (auto ticket : queued_.tickets) pager_->cancel(ticket);
  queued_ = Queued{};
}

std::vector<ExpertPager::Ticket> ExpertSweep::begin(int64_t layer, const std::vector<int64_t>& experts, bool dense,
                                                    Phase phase) {
  const int64_t num_layers = pager_->store().num_layers();
  std::vector<ExpertPager::Ticket> tickets;
  const bool covered = queued_.layer == layer &&
                       std::includes(queued_.experts.begin(), queued_.experts.end(), experts.begin(), experts.end());
  if (covered) {
    tickets = std::move(queued_.tickets);
    queued_ = Queued{};
  } else {
    drop_queued();
    tickets = pager_->prefetch(layer, experts, phase);
  }
  if (phase != Phase::backward) used_[static_cast<size_t>(layer)] = experts;

  const int64_t next = phase == Phase::backward ? layer - 1 : layer + 1;
  if (next < 0 || next >= num_layers) return tickets;
  std::vector<int64_t> ahead;
  if (phase == Phase::backward) {
    ahead = used_[static_cast<size_t>(next)];
  } else if (dense) {
    ahead.resize(static_cast<size_t>(pager_->store().num_experts()));
    std::iota(ahead.begin(), ahead.end(), int64_t{0});
  }
  if (!ahead.empty()) {
    auto ahead_tickets = pager_->prefetch(next, ahead, phase);
    queued_ = Queued{next, std::move(ahead_tickets), std::move(ahead)};
  }
  return tickets;
}

void ExpertSweep::reset() {
  failure_ = std::current_exception();
  queued_ = Queued{};
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

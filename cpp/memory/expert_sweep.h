// Which pages to ask for, and when: one sweep over the MoE layers, with the next layer's pages queued behind this
// one's.
//
// Shared by all expert layers of a model. It remembers, for each layer, the experts its latest forward used, so that
// the backward sweep fetches exactly those.
#pragma once
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "expert_pager.h"

namespace usaf {

class ExpertSweep {
 public:
  explicit ExpertSweep(std::shared_ptr<ExpertPager> pager);

  ExpertPager& pager() { return *pager_; }

  // Tickets for `layer`, covering at least `experts` (ascending). Uses what an earlier call queued for this layer if it
  // covers them; otherwise gives that up and queues anew. Then queues the next layer of the sweep: all of its experts
  // going up if `dense` (so many tokens that all will be hit), the ones it used last coming down.
  std::vector<ExpertPager::Ticket> begin(int64_t layer, const std::vector<int64_t>& experts, bool dense, Phase phase);

  // In the handler of an exception from the middle of a sweep: no ticket survives, and the exception is kept.
  void reset();

  // Throw the latest such exception, once, if it is one of this library's (errors.h) and its text is part of `text`: an
  // op of torch makes it a RuntimeError of that text.
  void rethrow_failure(const std::string& text);

 private:
  struct Queued {
    int64_t layer = -1;
    std::vector<ExpertPager::Ticket> tickets;
    std::vector<int64_t> experts;
  };
  void drop_queued();

  std::shared_ptr<ExpertPager> pager_;
  std::vector<std::vector<int64_t>> used_;  // by layer: experts of its latest forward
  Queued queued_;
  std::exception_ptr failure_;
};

}  // namespace usaf

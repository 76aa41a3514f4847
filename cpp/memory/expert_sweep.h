// Which pages to ask for, and when: one sweep over the MoE layers, with the pages of the layers to come queued behind
// this one's.
//
// Shared by all expert layers of a model. It remembers, for each layer, the experts its latest forward used, so that
// the backward sweep fetches exactly those.
#pragma once
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "expert_pager.h"
#include "host_readback.h"
#include "stream_order.h"

namespace usaf {

// Whether (token, slot) pairs are so many that practically every expert will be hit.
inline bool is_dense(int64_t num_pairs, int64_t num_experts) { return num_pairs >= 8 * num_experts; }

// An expert whose page is in a slot.
struct ExpertPage {
  const uint8_t* page;
  int64_t expert;
};

class ExpertSweep {
 public:
  explicit ExpertSweep(std::shared_ptr<ExpertPager> pager);

  ExpertPager& pager() { return *pager_; }

  // Tickets for `layer`, covering at least `experts` (ascending). Uses what an earlier call queued for this layer if it
  // covers them; otherwise gives that up and queues anew. Then queues the next layers of the sweep: all of their
  // experts going up if `dense` (so many tokens that all will be hit), the ones they used last coming down. A
  // training step's sweeps queue as many layers as the slots hold, inference one.
  std::vector<ExpertPager::Ticket> begin(int64_t layer, const std::vector<int64_t>& experts, bool dense, Phase phase);

  // Queue all experts of `layer` before its routing is known, unless an earlier call did: for a begin() that will be
  // `dense`, going up.
  void announce(int64_t layer, Phase phase);

  // Calls `body(group)` for groups of `routed` (ascending) in order, with their pages in slots, and has what it
  // launches on `compute_stream` come behind the pages' copies. Arguments as for begin(). An exception resets the
  // sweep.
  template <class Body>
  void for_each_group(int64_t layer, const std::vector<int64_t>& routed, bool dense, Phase phase,
                      Device::Stream compute_stream, const Body& body) {
    try {
      auto next = routed.begin();  // a ticket may bring more experts than were routed
      for (auto ticket : begin(layer, routed, dense, phase)) {
        pager_->wait(ticket, compute_stream);
        const std::vector<const uint8_t*> pages = pager_->pages(ticket);
        const std::vector<int64_t>& experts = pager_->experts_of(ticket);
        std::vector<ExpertPage> group;
        for (size_t i = 0; i < experts.size(); ++i) {
          if (next == routed.end() || experts[i] != *next) continue;
          group.push_back({pages[i], experts[i]});
          ++next;
        }
        if (!group.empty()) body(group);
        pager_->release(ticket, compute_stream);
      }
    } catch (...) {
      reset();
      throw;
    }
  }

  // The same, with `body(page, expert)` for each expert.
  template <class Body>
  void for_each_expert(int64_t layer, const std::vector<int64_t>& routed, bool dense, Phase phase,
                       Device::Stream compute_stream, const Body& body) {
    for_each_group(layer, routed, dense, phase, compute_stream, [&](const std::vector<ExpertPage>& group) {
      for (const ExpertPage& one : group) body(one.page, one.expert);
    });
  }

  // Of what the layers share or add to on the device beside the slots: scratch, gradients of banks.
  StreamOrder& order() { return order_; }

  // Through which results of the device come back to the host.
  HostReadback& readback() { return readback_; }

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
  std::vector<int64_t> all_experts() const;
  void drop_queued();
  int64_t layers_ahead(Phase phase) const;

  std::shared_ptr<ExpertPager> pager_;
  std::vector<std::vector<int64_t>> used_;  // by layer: experts of its latest forward
  std::deque<Queued> queued_;               // in the order of their use
  Phase latest_phase_ = Phase::inference;   // of the latest begin()
  int64_t latest_layer_ = -1;
  bool repeats_layers_ = false;
  HostReadback readback_;
  StreamOrder order_;
  std::exception_ptr failure_;
};

}  // namespace usaf

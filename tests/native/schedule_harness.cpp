// C interface to the schedule on the virtual device, for tests/virtual_time.py.
#include <string>

#include "random_schedules.h"
#include "schedule.h"

using namespace usaf;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string error_text;

template <class Body>
int64_t guarded(Body body) {
  try {
    return body();
  } catch (const std::exception& error) {
    error_text = error.what();
    return -1;
  }
}

}  // namespace

EXPORT const char* last_error() { return error_text.c_str(); }

EXPORT Schedule* schedule_new(int64_t num_layers, int64_t num_experts, int64_t num_slots, const VirtualRates* rates) {
  Schedule* schedule = nullptr;
  guarded([&] {
    const Sizes sizes{num_layers, num_experts, num_slots};
    schedule = new Schedule(sizes, make_numbered_store(sizes), *rates, Effects::late_copies);
    return 0;
  });
  return schedule;
}
EXPORT void schedule_free(Schedule* schedule) { delete schedule; }
EXPORT int64_t schedule_run_layer(Schedule* schedule, int64_t layer, int32_t phase, const LayerWork* work) {
  return guarded([&] { return schedule->run_layer(layer, static_cast<Phase>(phase), *work), 0; });
}
EXPORT int64_t schedule_launch(Schedule* schedule, double seconds, int64_t calls) {
  return guarded([&] { return schedule->launch(seconds, calls), 0; });
}

struct Figures {
  double compute_end;
  VirtualDevice::Totals totals;
  int64_t page_hits, page_misses, wrong_reads;
};
EXPORT int64_t schedule_figures(Schedule* schedule, Figures* figures) {
  return guarded([&] {
    const int64_t wrong_reads = schedule->wrong_reads();
    const PagerStats stats = schedule->stats();
    *figures = {schedule->compute_end(), schedule->device().totals(), stats.page_hits, stats.page_misses, wrong_reads};
    return 0;
  });
}

struct SpanFigures {
  int64_t is_copy, layer;
  double start, end;
};
// Copies and kernels so far; the oldest `room` of them go to `spans`. Layer num_layers: outside the layers.
EXPORT int64_t schedule_spans(Schedule* schedule, SpanFigures* spans, int64_t room) {
  const auto& found = schedule->device().spans();
  const ExpertStore& store = schedule->store();
  const int64_t layer_bytes = store.num_experts() * store.layout().page_bytes;
  for (size_t i = 0; i < std::min(found.size(), static_cast<size_t>(room)); ++i) {
    const auto& span = found[i];
    const auto* from = static_cast<const uint8_t*>(span.copied_from);
    spans[i] = {from != nullptr, from != nullptr ? (from - store.page(0, 0)) / layer_bytes : span.label, span.start,
                span.end};
  }
  return static_cast<int64_t>(found.size());
}

// Runs schedules of seeds from `first_seed` on, until in `wanted` of them a needed wait was forgotten (Fault::none:
// until so many ran), each with late and with early copies. Returns in how many of them a kernel read what it should
// not. `perfect`: no wait is kept back. num_run: how many schedules ran.
EXPORT int64_t run_random_schedules(uint64_t first_seed, int64_t wanted, int32_t fault, int32_t perfect,
                                    int64_t* num_run) {
  return guarded([&] {
    const auto kind = static_cast<Fault>(fault);
    int64_t caught = 0;
    *num_run = 0;
    for (int64_t counted = 0; counted < wanted; ++*num_run) {
      const RandomSchedule schedule(first_seed + static_cast<uint64_t>(*num_run));
      const auto late = schedule.run(Effects::late_copies, perfect != 0, kind);
      const auto early = schedule.run(Effects::early_copies, perfect != 0, kind);
      if (kind != Fault::none && !late.planted) continue;
      ++counted;
      caught += late.wrong_reads + early.wrong_reads > 0;
    }
    return caught;
  });
}

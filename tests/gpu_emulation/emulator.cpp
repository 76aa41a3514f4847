#include "emulator.h"

#include <link.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kMaxThreads = 1024, kMaxGridYZ = 65535;
constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration, hipErrorInvalidConfiguration

enum class State { ready, at_barrier, at_collective, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  dim3 thread;
  int linear;
  Site site;         // where it waits
  uint64_t mask;     // of the collective it waits at
  uint64_t value;    // its contribution
  void* fake_stack;  // AddressSanitizer's
};

struct Device {
  Position position;
  Fiber* current = nullptr;
  std::vector<Fiber> fibers;
  std::vector<std::vector<uint64_t>> values;  // [warp][lane]: of the collective that closed last
  std::vector<int> order;
  const std::function<void()>* body = nullptr;
  std::string failure;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
  int warp = 32, num_threads = 0;
};
Device device;

// By thread. Not thread_local: those are shared memory here.
struct LastErrors {
  std::mutex mutex;
  std::map<pid_t, int> of_thread;
};
LastErrors& last_errors() {
  static LastErrors instance;
  return instance;
}

thread_local char shared_anchor;  // lies among the shared variables

// AddressSanitizer has to be told of every stack switch.
void before_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, bytes);
#endif
}
void after_switch([[maybe_unused]] void* restore, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(restore, stack, bytes);
#endif
}

// From a fiber back to the scheduler, until it is resumed.
void suspend(State state) {
  Fiber& fiber = *device.current;
  fiber.state = state;
  before_switch(state == State::done ? nullptr : &fiber.fake_stack, device.scheduler_stack,
                device.scheduler_stack_bytes);
  swapcontext(&fiber.context, &device.scheduler);
  after_switch(fiber.fake_stack, &device.scheduler_stack, &device.scheduler_stack_bytes);
}

void fiber_main() {
  after_switch(nullptr, &device.scheduler_stack, &device.scheduler_stack_bytes);
  (*device.body)();
  suspend(State::done);
}

void resume(Fiber& fiber) {
  device.current = &fiber;
  device.position.thread = fiber.thread;
  device.position.linear = fiber.linear;
  before_switch(&device.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&device.scheduler, &fiber.context);
  after_switch(device.scheduler_fake_stack, nullptr, nullptr);
  if (!device.failure.empty()) throw std::runtime_error(device.failure);
}

void start_fibers() {
  const dim3 shape = device.position.block;
  for (int i = 0; i < device.num_threads; ++i) {
    Fiber& fiber = device.fibers[i];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.state = State::ready;
    fiber.linear = i;
    fiber.thread = dim3(i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y));
    fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && strcmp(a.file_name(), b.file_name()) == 0;
}

std::string where(const Site& site) { return std::string(site.file_name()) + ":" + std::to_string(site.line()); }

// Lets a barrier go that all threads of the block have reached. False if there is none.
bool close_barrier() {
  const auto begin = device.fibers.begin(), end = begin + device.num_threads;
  if (!std::all_of(begin, end, [](const Fiber& f) { return f.state == State::at_barrier; })) return false;
  for (auto fiber = begin; fiber != end; ++fiber) {
    if (!same_site(fiber->site, begin->site)) {
      throw std::runtime_error("barrier at " + where(begin->site) + " met a barrier at " + where(fiber->site));
    }
    fiber->state = State::ready;
  }
  return true;
}

// Lets the collectives of the warp at thread `first` go whose named lanes have all arrived. False if there is none.
bool close_collectives(int first) {
  bool closed = false;
  const int lanes = std::min(device.warp, device.num_threads - first);
  Fiber* warp = &device.fibers[first];
  for (int i = 0; i < lanes; ++i) {
    if (warp[i].state != State::at_collective) continue;
    const uint64_t mask = warp[i].mask;
    bool complete = true;
    for (int j = 0; j < device.warp; ++j) {
      if ((mask >> j & 1) == 0) continue;
      complete &= j < lanes && warp[j].state == State::at_collective && warp[j].mask == mask &&
                  same_site(warp[j].site, warp[i].site);
    }
    if (!complete) continue;
    for (int j = 0; j < lanes; ++j) {
      if ((mask >> j & 1) == 0) continue;
      device.values[first / device.warp][j] = warp[j].value;
      warp[j].state = State::ready;
    }
    closed = true;
  }
  return closed;
}

bool close_collectives() {
  bool closed = false;
  for (int first = 0; first < device.num_threads; first += device.warp) closed |= close_collectives(first);
  return closed;
}

[[noreturn]] void report_stuck() {
  int at_barrier = 0;
  for (int i = 0; i < device.num_threads; ++i) {
    const Fiber& fiber = device.fibers[i];
    at_barrier += fiber.state == State::at_barrier;
    if (fiber.state != State::at_collective) continue;
    throw std::runtime_error("warp collective at " + where(fiber.site) +
                             " not reached by all lanes of its mask (thread " + std::to_string(i) + " waits)");
  }
  throw std::runtime_error("partial barrier: reached by " + std::to_string(at_barrier) + " of " +
                           std::to_string(device.num_threads) + " threads");
}

// __shared__ variables are this library's thread-local ones (emulator.h): its TLS segment holds them and the anchor.
int fill_if_shared(dl_phdr_info* library, size_t, void*) {
  char* segment = static_cast<char*>(library->dlpi_tls_data);
  for (int i = 0; segment != nullptr && i < library->dlpi_phnum; ++i) {
    if (library->dlpi_phdr[i].p_type != PT_TLS) continue;
    char* end = segment + library->dlpi_phdr[i].p_memsz;
    if (&shared_anchor < segment || &shared_anchor >= end) continue;
    std::fill(segment, end, '\xff');
    return 1;
  }
  return 0;
}

void resume_ready(int thread) {
  if (device.fibers[thread].state == State::ready) resume(device.fibers[thread]);
}

// One warp after the other, each as far as it comes without the others.
void resume_whole_warps() {
  for (int first = 0; first < device.num_threads; first += device.warp) {
    do {
      for (int i = first; i < std::min(first + device.warp, device.num_threads); ++i) resume_ready(i);
    } while (close_collectives(first));
  }
}

void run_block() {
  shared_anchor = 0;  // makes sure that the segment exists
  if (dl_iterate_phdr(fill_if_shared, nullptr) == 0) throw std::logic_error("the shared variables are not found");
  start_fibers();
  for (;;) {
    if (control().schedule == kWholeWarps) resume_whole_warps();
    for (const int i : device.order) resume_ready(i);
    const bool all_done = std::all_of(device.fibers.begin(), device.fibers.begin() + device.num_threads,
                                      [](const Fiber& f) { return f.state == State::done; });
    if (all_done) return;
    if (!close_collectives() && !close_barrier()) report_stuck();
  }
}

void choose_order() {
  device.order.resize(device.num_threads);
  std::iota(device.order.begin(), device.order.end(), 0);
  const int schedule = control().schedule;
  if (schedule == 1) std::reverse(device.order.begin(), device.order.end());
  if (schedule > 1) std::shuffle(device.order.begin(), device.order.end(), std::minstd_rand(schedule));
}

}  // namespace

Control& control() {
  static Control instance;
  return instance;
}

const Position& position() { return device.position; }
int warp_size() { return device.warp; }
int lane() { return device.current->linear % device.warp; }

int take_last_error() {
  const std::lock_guard lock(last_errors().mutex);
  return std::exchange(last_errors().of_thread[gettid()], 0);
}

void set_last_error(int error) {
  const std::lock_guard lock(last_errors().mutex);
  last_errors().of_thread[gettid()] = error;
}

void launch(dim3 grid, dim3 shape, size_t shared_bytes, void* stream, int warp, const std::function<void()>& body) {
  static std::mutex one_at_a_time;  // torch runs backward passes on a thread of their own
  const std::lock_guard lock(one_at_a_time);
  control().last_stream = stream;
  ++control().launches;
  const uint64_t threads = uint64_t{shape.x} * shape.y * shape.z;
  const bool valid = threads >= 1 && threads <= kMaxThreads && grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 &&
                     grid.y <= kMaxGridYZ && grid.z >= 1 && grid.z <= kMaxGridYZ;
  const int refused = std::exchange(control().fail_launch, 0);
  if (refused != 0 || !valid) return set_last_error(valid ? refused : kInvalidConfiguration);

  device.num_threads = static_cast<int>(threads);
  device.warp = warp;
  device.body = &body;
  device.failure.clear();
  device.values.assign((threads + warp - 1) / warp, std::vector<uint64_t>(warp));
  if (device.fibers.size() < threads) device.fibers.resize(threads);
  const auto shared = std::make_unique<char[]>(shared_bytes);
  choose_order();
  try {
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          device.position = {grid, shape, dim3(x, y, z), dim3(), 0, shared.get()};
          std::fill_n(shared.get(), shared_bytes, '\xff');
          run_block();
        }
      }
    }
  } catch (...) {
    device.fibers.clear();  // suspended in mid-kernel: never resumed, stacks not reused
    throw;
  }
}

void fail(const std::string& message) {
  device.failure = message;
  suspend(State::done);
  std::abort();  // a failed fiber is never resumed
}

void barrier(Site site) {
  device.current->site = site;
  suspend(State::at_barrier);
}

uint64_t full_mask() {
  const int first = device.current->linear / device.warp * device.warp;
  const int lanes = std::min(device.warp, device.num_threads - first);
  return lanes == 64 ? ~uint64_t{0} : (uint64_t{1} << lanes) - 1;
}

const uint64_t* collect(uint64_t mask, uint64_t value, Site site) {
  Fiber& fiber = *device.current;
  if ((mask >> lane() & 1) == 0) fail("collective at " + where(site) + ": its mask leaves out the calling lane");
  fiber.site = site;
  fiber.mask = mask;
  fiber.value = value;
  suspend(State::at_collective);
  return device.values[fiber.linear / device.warp].data();
}

}  // namespace emulator

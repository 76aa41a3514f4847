// C interface to the devices and the pager, for tests/native_memory.py: the CPU device, the same made slow or failing,
// and the lazy device; pages from memory, or through a ring from what stands for a disk. Every function returns a value
// of at least 0, or -1 after an error (see last_error).
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "errors.h"
#include "lazy_device.h"
#include "lazy_reader.h"
#include "memory/expert_pager.h"
#include "memory/expert_store.h"
#include "memory/page_files.h"

namespace usaf {
namespace {

std::string error_kind, error_text;

template <class Body>
int64_t guarded(Body body) {
  try {
    return body();
  } catch (const DeviceError& error) {
    error_kind = "DeviceError", error_text = error.what();
  } catch (const BudgetError& error) {
    error_kind = "BudgetError", error_text = error.what();
  } catch (const StoreError& error) {
    error_kind = "StoreError", error_text = error.what();
  } catch (const std::invalid_argument& error) {
    error_kind = "ValueError", error_text = error.what();
  } catch (const std::logic_error& error) {
    error_kind = "AssertionError", error_text = error.what();
  }
  return -1;
}

// The CPU device with a worker that is busy before each copy, and calls that fail on demand: copies where they are
// queued (throws at once) or where they run (kept for whoever waits); the host's waits, for events that are not done
// yet; registration above a limit.
class TroubledDevice final : public Device {
 public:
  explicit TroubledDevice(int64_t busy_bytes) : busy_(static_cast<size_t>(2 * busy_bytes)) {}

  int64_t refuse_copy = -1, fail_copy = -1;  // which of the coming copies, counted from 0; -1: none
  std::atomic<bool> fail_waits = false;
  int64_t registrable_bytes = std::numeric_limits<int64_t>::max();

  const char* name() const override { return cpu_->name(); }
  MemoryInfo memory_info() const override { return cpu_->memory_info(); }
  Stream create_stream() override { return cpu_->create_stream(); }
  void destroy_stream(Stream stream) noexcept override { cpu_->destroy_stream(stream); }
  Event create_event() override { return cpu_->create_event(); }
  void destroy_event(Event event) noexcept override { cpu_->destroy_event(event); }
  void record(Event event, Stream stream) override { cpu_->record(event, stream); }
  void stream_wait(Stream stream, Event event) override { cpu_->stream_wait(stream, event); }
  bool query(Event event) override { return !fail_waits && cpu_->query(event); }
  void synchronize(Event event) override {
    if (fail_waits) throw DeviceError("wait failed");
    cpu_->synchronize(event);
  }
  void copy_async(void* dst, const void* src, int64_t bytes, Stream stream) override {
    if (refuse_copy >= 0 && refuse_copy-- == 0) throw DeviceError("copy refused");
    const bool fail = fail_copy >= 0 && fail_copy-- == 0;
    const int64_t half = static_cast<int64_t>(busy_.size() / 2);
    if (half > 0) cpu_->copy_async(busy_.data(), busy_.data() + half, half, stream);
    cpu_->copy_async(dst, fail ? nullptr : src, bytes, stream);
  }
  void register_host(void* pointer, size_t bytes) override {
    if (static_cast<int64_t>(bytes) > registrable_bytes) throw DeviceError("registration refused");
    registrable_bytes -= static_cast<int64_t>(bytes);
    cpu_->register_host(pointer, bytes);
  }
  void unregister_host(void* pointer) noexcept override { cpu_->unregister_host(pointer); }

 private:
  std::vector<uint8_t> busy_;
  std::shared_ptr<Device> cpu_ = make_cpu_device();  // destroyed first: its workers use busy_
};

bool page_holds(const uint8_t* page, int64_t bytes, int32_t number) {
  for (int64_t i = 0; i < bytes; i += 4) {
    int32_t word;
    std::memcpy(&word, page + i, 4);
    if (word != number) return false;
  }
  return true;
}

// A store whose pages hold their own number, a slab of poison, and a pager. With a ring, the store plays the disk.
struct Rig {
  std::atomic<int64_t> unreadable_page = -1;  // reads of it fail
  std::atomic<int64_t> read_microseconds = 0;
  std::shared_ptr<Device> device;
  std::unique_ptr<uint8_t, decltype(&std::free)> slab{nullptr, &std::free};
  std::shared_ptr<ExpertStore> store;
  LazyReader* lazy_reader = nullptr;   // the pager's, on the lazy device
  std::unique_ptr<ExpertPager> pager;  // destroyed first
  int64_t wrong_pages = 0;             // seen by kernels of the lazy device
};

int64_t page_bytes(const Rig& rig) { return rig.store->layout().page_bytes; }

std::unique_ptr<PageReader> make_reader(Rig& rig, ReadFault fault) {
  const auto read_page = [&rig](int64_t page, uint8_t* buffer) {
    if (rig.read_microseconds > 0) std::this_thread::sleep_for(std::chrono::microseconds(rig.read_microseconds));
    if (page == rig.unreadable_page) throw StoreError("page " + std::to_string(page) + ": unreadable");
    const int64_t num_experts = rig.store->num_experts();
    std::memcpy(buffer, rig.store->page(page / num_experts, page % num_experts), static_cast<size_t>(page_bytes(rig)));
  };
  if (dynamic_cast<LazyDevice*>(rig.device.get()) == nullptr) {
    return std::make_unique<ThreadedPageReader>(rig.device, read_page, 3);
  }
  auto reader = std::make_unique<LazyReader>(rig.device, read_page, page_bytes(rig), fault);
  rig.lazy_reader = reader.get();
  return reader;
}

}  // namespace
}  // namespace usaf

using namespace usaf;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* last_error_kind() { return error_kind.c_str(); }
EXPORT const char* last_error_text() { return error_text.c_str(); }

// ---- devices; handles of devices are pointers to shared_ptr<Device> ----

EXPORT void* device_cpu() { return new std::shared_ptr<Device>(make_cpu_device()); }
EXPORT void* device_lazy() { return new std::shared_ptr<Device>(std::make_shared<LazyDevice>()); }
EXPORT void* device_troubled(int64_t busy_bytes) {
  return new std::shared_ptr<Device>(std::make_shared<TroubledDevice>(busy_bytes));
}
EXPORT void device_free(std::shared_ptr<Device>* device) { delete device; }
EXPORT void troubled_refuse(std::shared_ptr<Device>* device, int64_t copy) {
  static_cast<TroubledDevice&>(**device).refuse_copy = copy;
}
EXPORT void troubled_fail(std::shared_ptr<Device>* device, int64_t copy) {
  static_cast<TroubledDevice&>(**device).fail_copy = copy;
}
EXPORT void troubled_fail_waits(std::shared_ptr<Device>* device, int64_t fail) {
  static_cast<TroubledDevice&>(**device).fail_waits = fail != 0;
}
EXPORT void troubled_registrable(std::shared_ptr<Device>* device, int64_t bytes) {
  static_cast<TroubledDevice&>(**device).registrable_bytes = bytes;
}
EXPORT int64_t lazy_run_some(std::shared_ptr<Device>* device, int64_t count, uint64_t seed) {
  return guarded([&] { return static_cast<LazyDevice&>(**device).run_some(count, seed); });
}
EXPORT int64_t lazy_num_queued(std::shared_ptr<Device>* device) {
  return static_cast<LazyDevice&>(**device).num_queued();
}

EXPORT const char* device_name(std::shared_ptr<Device>* device) { return (*device)->name(); }
EXPORT int64_t device_total_bytes(std::shared_ptr<Device>* device) { return (*device)->memory_info().total_bytes; }
EXPORT int64_t device_free_bytes(std::shared_ptr<Device>* device) { return (*device)->memory_info().free_bytes; }
EXPORT void* create_stream(std::shared_ptr<Device>* device) { return (*device)->create_stream(); }
EXPORT void destroy_stream(std::shared_ptr<Device>* device, void* stream) { (*device)->destroy_stream(stream); }
EXPORT void* create_event(std::shared_ptr<Device>* device) { return (*device)->create_event(); }
EXPORT void destroy_event(std::shared_ptr<Device>* device, void* event) { (*device)->destroy_event(event); }
EXPORT int64_t device_record(std::shared_ptr<Device>* device, void* event, void* stream) {
  return guarded([&] { return (*device)->record(event, stream), 0; });
}
EXPORT int64_t device_stream_wait(std::shared_ptr<Device>* device, void* stream, void* event) {
  return guarded([&] { return (*device)->stream_wait(stream, event), 0; });
}
EXPORT int64_t device_query(std::shared_ptr<Device>* device, void* event) {
  return guarded([&] { return (*device)->query(event) ? 1 : 0; });
}
EXPORT int64_t device_synchronize(std::shared_ptr<Device>* device, void* event) {
  return guarded([&] { return (*device)->synchronize(event), 0; });
}
EXPORT int64_t device_copy(std::shared_ptr<Device>* device, void* dst, const void* src, int64_t bytes, void* stream) {
  return guarded([&] { return (*device)->copy_async(dst, src, bytes, stream), 0; });
}
EXPORT int64_t device_register_host(std::shared_ptr<Device>* device, void* pointer, int64_t bytes) {
  return guarded([&] { return (*device)->register_host(pointer, static_cast<size_t>(bytes)), 0; });
}

// ---- memory that a device may have registered ----

EXPORT void* registration_new(std::shared_ptr<Device>* device, void* base, int64_t bytes, int64_t slab_bytes) {
  return new HostRegistration(*device, static_cast<uint8_t*>(base), bytes, 4096, slab_bytes);
}
EXPORT void registration_free(HostRegistration* registration) { delete registration; }

// A store in memory, of pages of 4096 bytes that nobody writes, sealed before or after it is registered.
EXPORT void* store_new(std::shared_ptr<Device>* device, int64_t num_pages, int64_t seal_first) {
  auto store = std::make_unique<ExpertStore>(1, num_pages, make_page_layout(Format::bf16, 64, 8));
  if (seal_first) store->seal();
  store->register_with(*device);
  store->seal();
  return store.release();
}
EXPORT const void* store_base(ExpertStore* store) { return store->page(0, 0); }
EXPORT void store_free(ExpertStore* store) { delete store; }

// ---- store and pager ----

// num_buffers 0: a store in memory.
EXPORT Rig* rig_new(std::shared_ptr<Device>* device, int64_t num_layers, int64_t num_experts, int64_t num_slots,
                    int64_t num_buffers, int32_t fault) {
  auto rig = std::make_unique<Rig>();
  const int64_t status = guarded([&] {
    rig->device = *device;
    rig->store = std::make_shared<ExpertStore>(num_layers, num_experts, make_page_layout(Format::bf16, 64, 8));
    for (int64_t page = 0; page < num_layers * num_experts; ++page) {
      auto* words = reinterpret_cast<int32_t*>(rig->store->writable_page(page / num_experts, page % num_experts));
      std::fill(words, words + page_bytes(*rig) / 4, static_cast<int32_t>(page));
    }
    rig->store->seal();
    rig->store->register_with(rig->device);
    const size_t slab_bytes = static_cast<size_t>(num_slots * page_bytes(*rig));
    rig->slab.reset(static_cast<uint8_t*>(std::aligned_alloc(4096, slab_bytes)));
    std::memset(rig->slab.get(), 0xFF, slab_bytes);
    auto reader = num_buffers == 0 ? nullptr : make_reader(*rig, static_cast<ReadFault>(fault));
    rig->pager = std::make_unique<ExpertPager>(rig->device, rig->store, rig->slab.get(), num_slots, num_buffers,
                                               std::move(reader));
    return 0;
  });
  return status < 0 ? nullptr : rig.release();
}
EXPORT void rig_free(Rig* rig) { delete rig; }
EXPORT int64_t rig_page_bytes(Rig* rig) { return page_bytes(*rig); }
EXPORT void rig_unreadable_page(Rig* rig, int64_t page) { rig->unreadable_page = page; }
EXPORT void rig_read_microseconds(Rig* rig, int64_t microseconds) { rig->read_microseconds = microseconds; }
EXPORT int64_t lazy_read_some(Rig* rig, int64_t count, uint64_t seed) {
  return guarded([&] { return rig->lazy_reader->run_some(count, seed); });
}

// The tickets go to `tickets`, which has room for `count` of them.
EXPORT int64_t pager_prefetch(Rig* rig, int64_t layer, const int64_t* experts, int64_t count, int32_t phase,
                              int64_t* tickets) {
  return guarded([&] {
    const auto given = rig->pager->prefetch(layer, {experts, experts + count}, static_cast<Phase>(phase));
    std::copy(given.begin(), given.end(), tickets);
    return static_cast<int64_t>(given.size());
  });
}
EXPORT int64_t pager_experts_of(Rig* rig, int64_t ticket, int64_t* experts) {
  return guarded([&] {
    const auto& found = rig->pager->experts_of(ticket);
    std::copy(found.begin(), found.end(), experts);
    return static_cast<int64_t>(found.size());
  });
}
EXPORT int64_t pager_wait(Rig* rig, int64_t ticket, void* stream) {
  return guarded([&] { return rig->pager->wait(ticket, stream), 0; });
}
EXPORT int64_t pager_release(Rig* rig, int64_t ticket, void* stream) {
  return guarded([&] { return rig->pager->release(ticket, stream), 0; });
}
EXPORT int64_t pager_cancel(Rig* rig, int64_t ticket) {
  return guarded([&] { return rig->pager->cancel(ticket), 0; });
}
EXPORT int64_t pager_reset(Rig* rig) {
  return guarded([&] { return rig->pager->reset(), 0; });
}
EXPORT int64_t pager_pages(Rig* rig, int64_t ticket, uintptr_t* addresses) {
  return guarded([&] {
    const auto found = rig->pager->pages(ticket);
    for (size_t i = 0; i < found.size(); ++i) addresses[i] = reinterpret_cast<uintptr_t>(found[i]);
    return static_cast<int64_t>(found.size());
  });
}
EXPORT int64_t pager_stat(Rig* rig, int32_t which) {
  const PagerStats stats = rig->pager->stats();
  return which == 0 ? stats.page_hits : which == 1 ? stats.page_misses : which == 2 ? stats.bytes_in : stats.bytes_read;
}
EXPORT int64_t pager_num_buffers(Rig* rig) { return rig->pager->num_buffers(); }
EXPORT int64_t pager_resize_ring(Rig* rig, int64_t num_buffers) {
  return guarded([&] { return rig->pager->resize_ring(num_buffers), 0; });
}

// Does the page at `address` hold what the store has for page `number`?
EXPORT int64_t page_is(Rig* rig, uintptr_t address, int64_t number) {
  return page_holds(reinterpret_cast<const uint8_t*>(address), page_bytes(*rig), static_cast<int32_t>(number));
}
// The same asked by a kernel on a stream of the lazy device; wrong_pages counts.
EXPORT void launch_check(Rig* rig, void* stream, uintptr_t address, int64_t number) {
  static_cast<LazyDevice&>(*rig->device).launch(stream, [=] { rig->wrong_pages += !page_is(rig, address, number); });
}
EXPORT int64_t wrong_pages(Rig* rig) { return rig->wrong_pages; }

// ---- page files; the harness is linked so that their pread is this one ----

namespace {
std::atomic<int64_t> interruptions = 0, most_bytes_at_once = 0, failing_reads = 0;
}

extern "C" ssize_t __real_pread(int, void*, size_t, off_t);
EXPORT ssize_t __wrap_pread(int descriptor, void* buffer, size_t bytes, off_t offset) {
  if (interruptions > 0 && interruptions-- > 0) return errno = EINTR, -1;
  if (failing_reads > 0 && failing_reads-- > 0) return errno = EIO, -1;
  if (most_bytes_at_once > 0) bytes = std::min(bytes, static_cast<size_t>(most_bytes_at_once));
  return __real_pread(descriptor, buffer, bytes, offset);
}

EXPORT void trouble_pread(int64_t interrupted, int64_t at_most, int64_t failing) {
  interruptions = interrupted, most_bytes_at_once = at_most, failing_reads = failing;
}
EXPORT void* files_new(const char* path, int64_t bytes, int64_t offset, int64_t page_bytes) {
  PageFiles* files = nullptr;
  guarded([&] {
    files = new PageFiles({{path, bytes}}, {{0, offset}}, page_bytes);
    return 0;
  });
  return files;
}
EXPORT void files_free(PageFiles* files) { delete files; }
EXPORT int64_t files_direct(PageFiles* files) { return files->direct(); }
EXPORT int64_t files_read(PageFiles* files, uint8_t* buffer) {
  return guarded([&] { return files->read(0, buffer), 0; });
}

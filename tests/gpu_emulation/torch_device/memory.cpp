#include "memory.h"

#include <cstring>
#include <map>
#include <mutex>
#include <new>

namespace fake_gpu {
namespace {

using c10::CachingAllocator::StatType;
using c10::CachingDeviceAllocator::DeviceStats;

constexpr std::align_val_t kAlign{64};
constexpr size_t kTotalBytes = size_t{8} << 30;

std::mutex stats_mutex;
DeviceStats stats;

void count(int64_t bytes) {
  const std::lock_guard lock(stats_mutex);
  for (c10::CachingAllocator::StatArray* counter :
       {&stats.allocated_bytes, &stats.active_bytes, &stats.reserved_bytes}) {
    auto& all = (*counter)[static_cast<size_t>(StatType::AGGREGATE)];
    if (bytes >= 0) {
      all.increase(static_cast<size_t>(bytes));
    } else {
      all.decrease(static_cast<size_t>(-bytes));
    }
  }
}

struct Block {
  void* memory;
  size_t bytes;
};

void free_block(void* context) {
  const auto* block = static_cast<Block*>(context);
  ::operator delete(block->memory, kAlign);
  count(-static_cast<int64_t>(block->bytes));
  delete block;
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, kDevice};
    void* memory = ::operator new(bytes, kAlign);
    memset(memory, 0xff, bytes);
    count(static_cast<int64_t>(bytes));
    return {memory, new Block{memory, bytes}, &free_block, kDevice};
  }
  void copy_data(void* dest, const void* src, size_t bytes) const override { default_copy_data(dest, src, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  DeviceStats getDeviceStats(c10::DeviceIndex) override {
    const std::lock_guard lock(stats_mutex);
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {
    const std::lock_guard lock(stats_mutex);
    for (auto* counter : {&stats.allocated_bytes, &stats.active_bytes, &stats.reserved_bytes}) {
      for (auto& stat : *counter) stat.reset_accumulated();
    }
  }
  void resetPeakStats(c10::DeviceIndex) override {
    const std::lock_guard lock(stats_mutex);
    for (auto* counter : {&stats.allocated_bytes, &stats.active_bytes, &stats.reserved_bytes}) {
      for (auto& stat : *counter) stat.reset_peak();
    }
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    const std::lock_guard lock(stats_mutex);
    const auto used = stats.allocated_bytes[static_cast<size_t>(StatType::AGGREGATE)].current;
    return {kTotalBytes - static_cast<size_t>(used), kTotalBytes};
  }
};

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;  // first byte, size

void free_pinned(void* memory) {
  {
    const std::lock_guard lock(pinned_mutex);
    pinned.erase(static_cast<const char*>(memory));
  }
  ::operator delete(memory, kAlign);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, c10::Device(c10::kCPU)};
    void* memory = ::operator new(bytes, kAlign);
    memset(memory, 0xff, bytes);
    const std::lock_guard lock(pinned_mutex);
    pinned[static_cast<const char*>(memory)] = bytes;
    return {memory, memory, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* dest, const void* src, size_t bytes) const override { default_copy_data(dest, src, bytes); }
};

struct Adopted {
  c10::Storage host;
  int64_t bytes;
};

void free_adopted(void* context) {
  const auto* adopted = static_cast<Adopted*>(context);
  count(-adopted->bytes);
  delete adopted;
}

DeviceMemory device_memory;
PinnedMemory pinned_memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &device_memory)

}  // namespace

c10::DeviceAllocator* device_allocator() { return &device_memory; }
c10::Allocator* pinned_allocator() { return &pinned_memory; }

bool is_pinned(const void* pointer) {
  const std::lock_guard lock(pinned_mutex);
  const auto* byte = static_cast<const char*>(pointer);
  auto block = pinned.upper_bound(byte);
  if (block == pinned.begin()) return false;
  --block;
  return byte < block->first + block->second;
}

c10::DataPtr adopt(c10::Storage host) {
  void* memory = host.mutable_data();
  const auto bytes = static_cast<int64_t>(host.nbytes());
  count(bytes);
  return {memory, new Adopted{std::move(host), bytes}, &free_adopted, kDevice};
}

}  // namespace fake_gpu

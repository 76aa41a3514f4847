#include "runtime.h"

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

namespace emulator::runtime {
namespace {

struct Stream;
struct Record {
  Stream* stream;
  bool done = false;
};
struct Operation {
  std::function<void()> work;
  std::shared_ptr<Record> awaited = nullptr;
};
struct Stream {
  bool eager = false;
  std::deque<Operation> operations;
};
struct Event {
  std::shared_ptr<Record> latest;  // null: never recorded, which counts as done
};

struct Runtime {
  std::recursive_mutex mutex;
  std::map<uintptr_t, size_t> registered;  // address, bytes
  std::set<void*> streams, events;
  std::map<std::pair<void*, void*>, int64_t> waits;  // of a stream for events of another
  int64_t registration_limit = std::numeric_limits<int64_t>::max(), host_waits = 0;
  int fail_copy = 0;
};
Runtime& state() {
  static Runtime runtime;
  return runtime;
}

// Run a stream's operations until `record` is done, and before each what it waits for.
void run_until(const Record& record) {
  while (!record.done) {
    Operation& next = record.stream->operations.front();
    if (next.awaited) run_until(*next.awaited);
    const std::function<void()> work = std::move(next.work);
    record.stream->operations.pop_front();
    work();
  }
}

void run_all(Stream& stream) {
  while (!stream.operations.empty()) {
    if (const auto awaited = stream.operations.front().awaited) run_until(*awaited);
    const std::function<void()> work = std::move(stream.operations.front().work);
    stream.operations.pop_front();
    work();
  }
}

enum class Registered { no, yes, partly };

Registered registered(const void* pointer, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(pointer), end = begin + bytes;
  for (const auto& [address, size] : state().registered) {
    if (begin >= address && end <= address + size) return Registered::yes;
    if (begin < address + size && end > address) return Registered::partly;
  }
  return Registered::no;
}

bool is_stream(void* stream) { return stream == nullptr || state().streams.contains(stream); }
bool runs_at_once(void* stream) { return stream == nullptr || static_cast<Stream*>(stream)->eager; }
bool is_event(void* event) { return state().events.contains(event); }

}  // namespace

int create_stream(void** stream) {
  const std::lock_guard lock(state().mutex);
  return state().streams.insert(*stream = new Stream), success;
}

int create_eager_stream(void** stream) {
  const std::lock_guard lock(state().mutex);
  return state().streams.insert(*stream = new Stream{true, {}}), success;
}

int destroy_stream(void* stream) {
  const std::lock_guard lock(state().mutex);
  if (stream == nullptr || !is_stream(stream)) return invalid_value;
  run_all(*static_cast<Stream*>(stream));
  state().streams.erase(stream);
  delete static_cast<Stream*>(stream);
  return success;
}

int create_event(void** event) {
  const std::lock_guard lock(state().mutex);
  return state().events.insert(*event = new Event), success;
}

int destroy_event(void* event) {
  const std::lock_guard lock(state().mutex);
  if (!is_event(event)) return invalid_value;
  state().events.erase(event);
  delete static_cast<Event*>(event);
  return success;
}

int record(void* event, void* stream) {
  const std::lock_guard lock(state().mutex);
  if (!is_event(event) || !is_stream(stream)) return invalid_value;
  const auto record = std::make_shared<Record>(Record{static_cast<Stream*>(stream), runs_at_once(stream)});
  if (!record->done) record->stream->operations.push_back({[record] { record->done = true; }});
  static_cast<Event*>(event)->latest = record;
  return success;
}

int stream_wait(void* stream, void* event) {
  const std::lock_guard lock(state().mutex);
  if (!is_event(event) || !is_stream(stream)) return invalid_value;
  const auto latest = static_cast<Event*>(event)->latest;
  if (latest != nullptr) ++state().waits[{stream, latest->stream}];
  if (latest == nullptr || latest->done) return success;
  if (runs_at_once(stream)) return run_until(*latest), success;
  static_cast<Stream*>(stream)->operations.push_back({[] {}, latest});
  return success;
}

int query(void* event) {
  const std::lock_guard lock(state().mutex);
  if (!is_event(event)) return invalid_value;
  const auto& latest = static_cast<Event*>(event)->latest;
  return latest == nullptr || latest->done ? success : not_ready;
}

int synchronize(void* event) {
  const std::lock_guard lock(state().mutex);
  if (!is_event(event)) return invalid_value;
  ++state().host_waits;
  if (const auto latest = static_cast<Event*>(event)->latest) run_until(*latest);
  return success;
}

int synchronize_device() {
  const std::lock_guard lock(state().mutex);
  ++state().host_waits;
  for (void* stream : state().streams) run_all(*static_cast<Stream*>(stream));
  return success;
}

int copy_async(void* dst, const void* src, size_t bytes, void* stream) {
  const std::lock_guard lock(state().mutex);
  if (!is_stream(stream) || (bytes > 0 && (dst == nullptr || src == nullptr))) return invalid_value;
  if (const int error = std::exchange(state().fail_copy, 0)) return error;
  const Registered to = registered(dst, bytes), from = registered(src, bytes);
  if (to == Registered::partly || from == Registered::partly) return invalid_value;
  const auto work = [=] { std::memcpy(dst, src, bytes); };
  if (runs_at_once(stream)) return work(), success;
  static_cast<Stream*>(stream)->operations.push_back({work});
  if (to == Registered::no && from == Registered::no) run_all(*static_cast<Stream*>(stream));
  return success;
}

int register_host(void* pointer, size_t bytes) {
  const std::lock_guard lock(state().mutex);
  if (pointer == nullptr || bytes == 0 || registered(pointer, bytes) != Registered::no) return invalid_value;
  int64_t total = static_cast<int64_t>(bytes);
  for (const auto& [address, size] : state().registered) total += static_cast<int64_t>(size);
  if (total > state().registration_limit) return out_of_memory;
  // Drivers pin for writing: memory that is read-only faults here.
  for (size_t i = 0; i < bytes; i += 4096) {
    volatile char* byte = static_cast<char*>(pointer) + i;
    *byte = *byte;
  }
  state().registered[reinterpret_cast<uintptr_t>(pointer)] = bytes;
  return success;
}

int unregister_host(void* pointer) {
  const std::lock_guard lock(state().mutex);
  return state().registered.erase(reinterpret_cast<uintptr_t>(pointer)) == 1 ? success : invalid_value;
}

const char* error_text(int error) {
  switch (error) {
    case success:
      return "no error";
    case invalid_value:
      return "invalid argument";
    case out_of_memory:
      return "out of memory";
    case not_ready:
      return "device not ready";
    default:
      return "emulated error";
  }
}

}  // namespace emulator::runtime

// For the tests, by ctypes.
#define EXPORT extern "C" __attribute__((visibility("default")))
using emulator::runtime::state;

EXPORT void emulated_limit_registration(int64_t bytes) { state().registration_limit = bytes; }
EXPORT void emulated_fail_next_copy(int error) { state().fail_copy = error; }
EXPORT int64_t emulated_host_waits() { return state().host_waits; }
EXPORT int64_t emulated_waits(void* stream, void* recorded_on) { return state().waits[{stream, recorded_on}]; }
EXPORT int64_t emulated_registered_bytes() {
  int64_t total = 0;
  for (const auto& [address, size] : state().registered) total += static_cast<int64_t>(size);
  return total;
}
EXPORT int64_t emulated_queued_operations() {
  int64_t total = 0;
  for (void* stream : state().streams) {
    total += static_cast<int64_t>(static_cast<emulator::runtime::Stream*>(stream)->operations.size());
  }
  return total;
}

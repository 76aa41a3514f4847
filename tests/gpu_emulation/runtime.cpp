#include "runtime.h"

#include <unistd.h>

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

#include "emulator.h"

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
  int device;
  bool eager = false;
  std::deque<Operation> operations;
};
struct Event {
  int device;
  std::shared_ptr<Record> latest;  // null: never recorded, which counts as done
};

struct Registration {
  size_t bytes;
  int device;
};

struct Runtime {
  std::recursive_mutex mutex;
  std::map<uintptr_t, Registration> registered;  // by address
  std::set<void*> streams, events;
  std::map<pid_t, int> current_device;  // by thread
  std::set<int> contexts;               // devices that were used
  int num_devices = 1;
  const pid_t process = getpid();
  int64_t calls_elsewhere = 0;  // about a stream, event or registered memory of another device than the current one
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
  for (const auto& [address, registration] : state().registered) {
    if (begin >= address && end <= address + registration.bytes) return Registered::yes;
    if (begin < address + registration.bytes && end > address) return Registered::partly;
  }
  return Registered::no;
}

bool is_stream(void* stream) { return stream == nullptr || state().streams.contains(stream); }
bool runs_at_once(void* stream) { return stream == nullptr || static_cast<Stream*>(stream)->eager; }
bool is_event(void* event) { return state().events.contains(event); }

int failed(int error) { return emulator::set_last_error(error), error; }

// A call that needs the thread's current device. The other end, if it has a device: that.
int use_device() {
  if (getpid() != state().process) _exit(77);
  const int device = state().current_device[gettid()];
  state().contexts.insert(device);
  return device;
}
void use_device_of(int device) { state().calls_elsewhere += use_device() != device; }
void use_stream(void* stream) {
  stream == nullptr ? static_cast<void>(use_device()) : use_device_of(static_cast<Stream*>(stream)->device);
}
void use_event(void* event) { use_device_of(static_cast<Event*>(event)->device); }

// Of registered memory, which the device may want to write at any time.
void touch(const void* pointer) {
  volatile char* byte = static_cast<char*>(const_cast<void*>(pointer));
  *byte = *byte;
}

}  // namespace

int get_device(int* device) {
  const std::lock_guard lock(state().mutex);
  return *device = state().current_device[gettid()], success;
}

int count_devices(int* count) {
  const std::lock_guard lock(state().mutex);
  return *count = state().num_devices, success;
}

int set_device(int device) {
  const std::lock_guard lock(state().mutex);
  if (device < 0 || device >= state().num_devices) return failed(invalid_value);
  state().current_device[gettid()] = device;
  return use_device(), success;  // makes a context, as CUDA's from version 12 on
}

int create_stream(void** stream) {
  const std::lock_guard lock(state().mutex);
  return state().streams.insert(*stream = new Stream{use_device(), false, {}}), success;
}

int create_eager_stream(void** stream) {
  const std::lock_guard lock(state().mutex);
  return state().streams.insert(*stream = new Stream{use_device(), true, {}}), success;
}

int destroy_stream(void* stream) {
  const std::lock_guard lock(state().mutex);
  if (stream == nullptr || !is_stream(stream)) return failed(invalid_value);
  use_stream(stream);
  run_all(*static_cast<Stream*>(stream));
  state().streams.erase(stream);
  delete static_cast<Stream*>(stream);
  return success;
}

int create_event(void** event) {
  const std::lock_guard lock(state().mutex);
  return state().events.insert(*event = new Event{use_device(), nullptr}), success;
}

int destroy_event(void* event) {
  const std::lock_guard lock(state().mutex);
  if (!is_event(event)) return failed(invalid_value);
  use_event(event);
  state().events.erase(event);
  delete static_cast<Event*>(event);
  return success;
}

int record(void* event, void* stream) {
  const std::lock_guard lock(state().mutex);
  if (!is_event(event) || !is_stream(stream)) return failed(invalid_value);
  use_event(event), use_stream(stream);
  const auto record = std::make_shared<Record>(Record{static_cast<Stream*>(stream), runs_at_once(stream)});
  if (!record->done) record->stream->operations.push_back({[record] { record->done = true; }});
  static_cast<Event*>(event)->latest = record;
  return success;
}

int stream_wait(void* stream, void* event) {
  const std::lock_guard lock(state().mutex);
  if (!is_event(event) || !is_stream(stream)) return failed(invalid_value);
  use_stream(stream);
  const auto latest = static_cast<Event*>(event)->latest;
  if (latest != nullptr) ++state().waits[{stream, latest->stream}];
  if (latest == nullptr || latest->done) return success;
  if (runs_at_once(stream)) return run_until(*latest), success;
  static_cast<Stream*>(stream)->operations.push_back({[] {}, latest});
  return success;
}

int query(void* event) {
  const std::lock_guard lock(state().mutex);
  if (!is_event(event)) return failed(invalid_value);
  use_event(event);
  const auto& latest = static_cast<Event*>(event)->latest;
  return latest == nullptr || latest->done ? success : failed(not_ready);
}

int synchronize(void* event) {
  const std::lock_guard lock(state().mutex);
  if (!is_event(event)) return failed(invalid_value);
  use_event(event);
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
  if (!is_stream(stream) || (bytes > 0 && (dst == nullptr || src == nullptr))) return failed(invalid_value);
  if (const int error = std::exchange(state().fail_copy, 0)) return failed(error);
  use_stream(stream);
  const Registered to = registered(dst, bytes), from = registered(src, bytes);
  if (to == Registered::partly || from == Registered::partly) return failed(invalid_value);
  if (from == Registered::yes) touch(src);
  const auto work = [=] { std::memcpy(dst, src, bytes); };
  if (runs_at_once(stream)) return work(), success;
  static_cast<Stream*>(stream)->operations.push_back({work});
  if (to == Registered::no && from == Registered::no) run_all(*static_cast<Stream*>(stream));
  return success;
}

int register_host(void* pointer, size_t bytes) {
  const std::lock_guard lock(state().mutex);
  if (pointer == nullptr || bytes == 0 || registered(pointer, bytes) != Registered::no) return failed(invalid_value);
  int64_t total = static_cast<int64_t>(bytes);
  for (const auto& [address, registration] : state().registered) total += static_cast<int64_t>(registration.bytes);
  if (total > state().registration_limit) return failed(out_of_memory);
  for (size_t i = 0; i < bytes; i += 4096) touch(static_cast<char*>(pointer) + i);  // drivers pin for writing
  state().registered[reinterpret_cast<uintptr_t>(pointer)] = {bytes, use_device()};
  return success;
}

int unregister_host(void* pointer) {
  const std::lock_guard lock(state().mutex);
  const auto found = state().registered.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == state().registered.end()) return failed(invalid_value);
  use_device_of(found->second.device);
  return state().registered.erase(found), success;
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

// There are `count` devices, and none was used yet.
EXPORT void emulated_set_devices(int64_t count) {
  state().num_devices = static_cast<int>(count);
  state().contexts.clear();
  state().calls_elsewhere = 0;
}
EXPORT int64_t emulated_set_device(int64_t device) { return emulator::runtime::set_device(static_cast<int>(device)); }
EXPORT int64_t emulated_is_used(int64_t device) { return state().contexts.contains(static_cast<int>(device)); }
EXPORT int64_t emulated_calls_elsewhere() { return state().calls_elsewhere; }
EXPORT void emulated_limit_registration(int64_t bytes) { state().registration_limit = bytes; }
EXPORT void emulated_fail_next_copy(int error) { state().fail_copy = error; }
EXPORT int64_t emulated_host_waits() { return state().host_waits; }
EXPORT int64_t emulated_waits(void* stream, void* recorded_on) { return state().waits[{stream, recorded_on}]; }
EXPORT int64_t emulated_registered_bytes() {
  int64_t total = 0;
  for (const auto& [address, registration] : state().registered) total += static_cast<int64_t>(registration.bytes);
  return total;
}
EXPORT int64_t emulated_queued_operations() {
  int64_t total = 0;
  for (void* stream : state().streams) {
    total += static_cast<int64_t>(static_cast<emulator::runtime::Stream*>(stream)->operations.size());
  }
  return total;
}

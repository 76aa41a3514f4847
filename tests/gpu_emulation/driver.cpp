// Test-only: "device" memory and the emulator's controls, for ctypes. Linked with the emulator, and with a driver and
// the source of cuda/ or hip/ that it calls.
#include <cstdlib>
#include <new>
#include <string>

#include "emulator.h"
#include "guarded.h"

std::string& driver_message() {
  static std::string message;
  return message;
}

extern "C" {

const char* last_message() { return driver_message().c_str(); }
void set_schedule(int schedule) { emulator::control().schedule = schedule; }
void fail_next_launch(int error) { emulator::control().fail_launch = error; }
void leave_an_error() {
  emulator::launch(dim3(0), dim3(1), 0, nullptr, 32, [] {});
}  // that nobody takes
void* last_stream() { return emulator::control().last_stream; }
int64_t launches() { return emulator::control().launches; }

// Exactly `bytes` long, so that AddressSanitizer sees the first byte past the end. 16-byte aligned.
void* device_malloc(size_t bytes) { return ::operator new(bytes, std::align_val_t{16}); }
void device_free(void* memory) { ::operator delete(memory, std::align_val_t{16}); }

}  // extern "C"

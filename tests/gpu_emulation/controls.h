// Test-only: what every driver of emulated kernels exports: errors, the emulator's controls and "device" memory.
#pragma once
#include <cstdint>
#include <exception>
#include <new>
#include <string>

#include "emulator.h"

inline std::string message;

// 0, or 1 with `message` set to what was thrown.
template <class Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

extern "C" {

const char* last_message() { return message.c_str(); }
void set_schedule(int schedule) { emulator::control().schedule = schedule; }
void fail_next_launch(int error) { emulator::control().fail_launch = error; }
void* last_stream() { return emulator::control().last_stream; }
int64_t launches() { return emulator::control().launches; }

// Exactly `bytes` long, so that AddressSanitizer sees the first byte past the end. 16-byte aligned.
void* device_malloc(size_t bytes) { return ::operator new(bytes, std::align_val_t{16}); }
void device_free(void* memory) { ::operator delete(memory, std::align_val_t{16}); }

}  // extern "C"

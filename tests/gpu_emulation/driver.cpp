// Test-only: the codec launchers, "device" memory and the emulator's controls, for ctypes. Linked with the emulator and
// with either cuda/codec.cu or hip/codec.hip.
#include <cstdlib>
#include <new>
#include <string>

#include "emulator.h"
#include "kernel_api.h"

namespace {

std::string message;

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

}  // namespace

extern "C" {

const char* last_message() { return message.c_str(); }
void set_schedule(int schedule) { emulator::control().schedule = schedule; }
void fail_next_launch(int error) { emulator::control().fail_launch = error; }
void* last_stream() { return emulator::control().last_stream; }
int64_t launches() { return emulator::control().launches; }

// Exactly `bytes` long, so that AddressSanitizer sees the first byte past the end. 16-byte aligned.
void* device_malloc(size_t bytes) { return ::operator new(bytes, std::align_val_t{16}); }
void device_free(void* memory) { ::operator delete(memory, std::align_val_t{16}); }

int encode_rows(const void* weight, uint8_t* codes, void* absmax, const int64_t* row_index, int64_t num_rows,
                int64_t cols, int64_t weight_stride, int format, int dtype, void* stream) {
  return guarded([&] {
    usaf::gpu::encode_rows({weight, codes, absmax, row_index, num_rows, cols, weight_stride,
                            static_cast<usaf::Format>(format), static_cast<usaf::DType>(dtype)},
                           stream);
  });
}

int decode_rows(const uint8_t* codes, const void* absmax, void* out, const int64_t* row_index, const int64_t* out_index,
                int64_t num_rows, int64_t cols, int64_t out_stride, int format, int dtype, void* stream) {
  return guarded([&] {
    usaf::gpu::decode_rows({codes, absmax, out, row_index, out_index, num_rows, cols, out_stride,
                            static_cast<usaf::Format>(format), static_cast<usaf::DType>(dtype)},
                           stream);
  });
}

}  // extern "C"

// Test-only: the codec launchers, "device" memory and the emulator's controls, for ctypes. Linked with the emulator and
// with either cuda/codec.cu or hip/codec.hip.
#include "controls.h"
#include "kernel_api.h"

extern "C" {

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

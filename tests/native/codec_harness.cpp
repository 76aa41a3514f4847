// Test-only: the CPU codec's blocks, rows and instruction sets, and the 16-bit conversions, for ctypes.
#include "cpu/codec_row.h"
#include "cpu/isa.h"
#include "kernel_api.h"
#include "numerics/float16.h"
#include "numerics/fp8.h"

using namespace usaf;

extern "C" {

int detected_isa() { return static_cast<int>(cpu::detected_isa()); }
void limit_isa(int limit) { cpu::limit_isa(static_cast<cpu::Isa>(limit)); }

void to_halves(const float* values, int64_t count, F16* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_f16(values[i]);
}
void to_halves_up(const float* values, int64_t count, F16* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_f16_up(values[i]);
}
void from_halves(const F16* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(values[i]);
}
void from_fp8(const uint8_t* codes, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = fp8_decode(codes[i]);
}

void encode_block(int64_t format, const float* weight, int64_t count, const uint32_t* random, uint8_t* codes,
                  void* absmax) {
  cpu::encode_block(static_cast<Format>(format), weight, count, random, codes, absmax);
}
void decode_block(int64_t format, const uint8_t* codes, const void* absmax, int64_t count, float* out) {
  cpu::decode_block(static_cast<Format>(format), codes, absmax, count, out);
}
void encode_rows(int64_t format, int64_t dtype, const void* weight, int64_t num_rows, int64_t cols, uint8_t* codes,
                 void* absmax) {
  cpu::encode_rows(
      {weight, codes, absmax, nullptr, num_rows, cols, cols, static_cast<Format>(format), static_cast<DType>(dtype)},
      nullptr);
}
void decode_rows(int64_t format, int64_t dtype, const uint8_t* codes, const void* absmax, int64_t num_rows,
                 int64_t cols, void* out) {
  cpu::decode_rows({codes, absmax, out, nullptr, nullptr, num_rows, cols, cols, static_cast<Format>(format),
                    static_cast<DType>(dtype)},
                   nullptr);
}

}  // extern "C"

// Weight formats: their names, block size and the bytes of one encoded row. The only place that defines them.
//
// A row of `cols` weights becomes `code_bytes(format, cols)` bytes of codes (padded to 16 with zeros) and
// `num_blocks(format, cols)` scales of `scale_bytes(format)` bytes. Blocks of 64 weights run along the row; a row whose
// length is no multiple of 64 ends in a short block.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace usaf {

// The values stand in files: never renumber.
enum class Format : int32_t { bf16 = 0, nf4 = 1, nf4_f16 = 2, int8 = 3, fp8 = 4 };
inline constexpr int kNumFormats = 5;

inline constexpr const char* format_name(Format format) {
  constexpr const char* names[kNumFormats] = {"bf16", "nf4", "nf4_f16", "int8", "fp8"};
  return names[static_cast<int>(format)];
}

inline constexpr int64_t kBlockSize = 64;  // weights per scale
inline constexpr int64_t kRowAlign = 16;   // bytes; row strides are multiples of this

USAF_HD constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

USAF_HD constexpr bool is_nf4(Format format) { return format == Format::nf4 || format == Format::nf4_f16; }

USAF_HD constexpr int64_t code_bits(Format format) { return format == Format::bf16 ? 16 : is_nf4(format) ? 4 : 8; }

USAF_HD constexpr int64_t scale_bytes(Format format) { return format == Format::nf4_f16 ? 2 : 4; }

USAF_HD constexpr int64_t num_blocks(Format format, int64_t cols) {
  return format == Format::bf16 ? 0 : (cols + kBlockSize - 1) / kBlockSize;
}

// Bytes of `cols` codes, without the padding.
USAF_HD constexpr int64_t used_bytes(Format format, int64_t cols) { return (cols * code_bits(format) + 7) / 8; }

USAF_HD constexpr int64_t code_bytes(Format format, int64_t cols) {
  return round_up(used_bytes(format, cols), kRowAlign);
}

static_assert(code_bytes(Format::nf4, 2048) == 1024 && num_blocks(Format::nf4, 2048) == 32);
static_assert(code_bytes(Format::nf4_f16, 65) == 48 && num_blocks(Format::nf4_f16, 65) == 2);
static_assert(code_bytes(Format::int8, 2048) == 2048 && code_bytes(Format::fp8, 65) == 80);
static_assert(code_bytes(Format::bf16, 2048) == 4096 && num_blocks(Format::bf16, 2048) == 0);

}  // namespace usaf

// Weight formats: their names, block size and the bytes of one encoded row. The only place that defines them.
//
// A row of `cols` weights becomes `code_bytes(format, cols)` bytes of codes (padded to 16) and `num_blocks(format,
// cols)` fp32 scales. Blocks of 64 weights run along the row; a row whose length is no multiple of 64 ends in a short
// block.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace usaf {

// The values stand in files: never renumber.
enum class Format : int32_t { bf16 = 0, nf4 = 1 };
inline constexpr int kNumFormats = 2;

inline constexpr const char* format_name(Format format) { return format == Format::bf16 ? "bf16" : "nf4"; }

inline constexpr int64_t kBlockSize = 64;  // weights per scale
inline constexpr int64_t kRowAlign = 16;   // bytes; row strides are multiples of this

USAF_HD constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

USAF_HD constexpr int64_t num_blocks(Format format, int64_t cols) {
  return format == Format::bf16 ? 0 : (cols + kBlockSize - 1) / kBlockSize;
}

USAF_HD constexpr int64_t scale_bytes(Format) { return 4; }

// Bytes of `cols` codes, without the padding.
USAF_HD constexpr int64_t used_bytes(Format format, int64_t cols) {
  return format == Format::bf16 ? 2 * cols : (cols + 1) / 2;
}

USAF_HD constexpr int64_t code_bytes(Format format, int64_t cols) {
  return round_up(used_bytes(format, cols), kRowAlign);
}

static_assert(code_bytes(Format::nf4, 2048) == 1024 && num_blocks(Format::nf4, 2048) == 32);
static_assert(code_bytes(Format::nf4, 65) == 48 && num_blocks(Format::nf4, 65) == 2);
static_assert(code_bytes(Format::bf16, 2048) == 4096 && num_blocks(Format::bf16, 2048) == 0);

}  // namespace usaf

#include "panel.h"

#include <algorithm>
#include <cstring>

#include "codec_row.h"
#include "isa.h"
#include "parallel.h"

#ifdef USAF_HAS_ISA_LEVELS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own header: the undefined source of a full mask
#include <immintrin.h>
#endif

namespace usaf::cpu {
namespace {

constexpr int64_t kTransposedRows = 16, kTransposedCols = 512;  // a tile of 16 KB, in the L1 cache
constexpr int64_t kStraightRows = 32, kStraightCols = kPanelsAtOnce * kPanelColumns;  // 8 KB

// Rows [first_row, first_row + num_rows), columns [first_col, first_col + cols) of the matrix, decoded. Overlaid rows
// are decoded over those of the page.
void decode_tile(const EncodedMatrix& matrix, int64_t first_row, int64_t num_rows, int64_t first_col, int64_t cols,
                 Bf16* tile, int64_t tile_stride) {
  const int64_t code_stride = code_bytes(matrix.format, matrix.cols);
  const int64_t scale_stride = num_blocks(matrix.format, matrix.cols) * scale_bytes(matrix.format);
  const int64_t code_offset = used_bytes(matrix.format, first_col);
  const int64_t scale_offset = num_blocks(matrix.format, first_col) * scale_bytes(matrix.format);
  const auto rows_of = [&](const uint8_t* codes, const void* absmax, int64_t row) {
    return EncodedRows{codes + row * code_stride + code_offset,
                       static_cast<const uint8_t*>(absmax) + row * scale_stride + scale_offset, code_stride,
                       scale_stride, num_rows};
  };
  decode_rows_of(matrix.format, rows_of(matrix.codes, matrix.absmax, first_row), num_rows, cols, tile, tile_stride);
  for (const RowOverlay& overlay : matrix.overlays) {
    const int64_t* end = overlay.target + overlay.count;
    for (const int64_t* target = std::lower_bound(overlay.target, end, first_row);
         target != end && *target < first_row + num_rows; ++target) {
      decode_rows_of(matrix.format, rows_of(overlay.codes, overlay.absmax, overlay.source[target - overlay.target]), 1,
                     cols, tile + (*target - first_row) * tile_stride, tile_stride);
    }
  }
}

// Zeros in rows [num_rows, tile_rows) and columns [cols, tile_cols) of the tile.
void pad_tile(int64_t num_rows, int64_t cols, int64_t tile_rows, int64_t tile_cols, Bf16* tile, int64_t tile_stride) {
  for (int64_t row = 0; row < tile_rows; ++row) {
    const int64_t valid = row < num_rows ? cols : 0;
    std::fill(tile + row * tile_stride + valid, tile + row * tile_stride + tile_cols, Bf16{});
  }
}

#ifdef USAF_HAS_ISA_LEVELS

// Transposes 16 x 16 pairs of bf16: 32 columns of 16 tile rows become 16 rows of a panel, `to_stride` elements apart.
USAF_AVX512 void transpose_pairs(const Bf16* from, int64_t from_stride, Bf16* to, int64_t to_stride) {
  __m512i row[16], half[16];
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 8; ++i) {
    half[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
    half[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    row[4 * i] = _mm512_unpacklo_epi64(half[4 * i], half[4 * i + 2]);
    row[4 * i + 1] = _mm512_unpackhi_epi64(half[4 * i], half[4 * i + 2]);
    row[4 * i + 2] = _mm512_unpacklo_epi64(half[4 * i + 1], half[4 * i + 3]);
    row[4 * i + 3] = _mm512_unpackhi_epi64(half[4 * i + 1], half[4 * i + 3]);
  }
  // row[4 * i + j]: lane l holds column 4 * l + j of rows 4 * i .. 4 * i + 3. What is left is a transpose of lanes.
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xdd);
    const __m512i high_odd = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xdd);
    _mm512_storeu_si512(to + j * to_stride, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(to + (4 + j) * to_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(to + (8 + j) * to_stride, _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_storeu_si512(to + (12 + j) * to_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
  }
}

// Rows 2i and 2i + 1 of a tile, `num_rows` (even) of them and 64 columns, become pairs of a panel.
USAF_AVX512 void interleave_rows(const Bf16* from, int64_t from_stride, int64_t num_rows, Bf16* panel) {
  // 16-bit element i of the result: element i / 2 (low) or 16 + i / 2 (high) of the even (+ 0) or odd (+ 32) row.
  alignas(64) uint16_t low_index[32], high_index[32];
  for (uint16_t i = 0; i < 32; ++i) {
    low_index[i] = static_cast<uint16_t>(i / 2 + 32 * (i % 2));
    high_index[i] = static_cast<uint16_t>(16 + i / 2 + 32 * (i % 2));
  }
  const __m512i low = _mm512_load_si512(low_index), high = _mm512_load_si512(high_index);
  for (int64_t row = 0; row < num_rows; row += 2) {
    for (int64_t half = 0; half < kPanelColumns; half += 32) {
      const __m512i even = _mm512_loadu_si512(from + row * from_stride + half);
      const __m512i odd = _mm512_loadu_si512(from + (row + 1) * from_stride + half);
      Bf16* to = panel + row * kPanelColumns + 2 * half;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

#else

void transpose_pairs(const Bf16*, int64_t, Bf16*, int64_t) {}
void interleave_rows(const Bf16*, int64_t, int64_t, Bf16*) {}

#endif

}  // namespace

bool panels_supported() { return isa() == Isa::avx512; }

void decode_transposed_panel(const EncodedMatrix& matrix, int64_t first_row, int64_t first_col, int64_t depth,
                             Bf16* panel) {
  alignas(64) Bf16 tile[kTransposedRows * kTransposedCols];
  for (int64_t column = 0; column < kPanelColumns; column += kTransposedRows) {
    const int64_t row = first_row + column;
    const int64_t num_rows = std::clamp(matrix.num_rows - row, int64_t{0}, kTransposedRows);
    for (int64_t start = 0; start < depth; start += kTransposedCols) {
      const int64_t cols = std::min(kTransposedCols, depth - start), padded = round_up(cols, kPanelStep);
      if (num_rows > 0) decode_tile(matrix, row, num_rows, first_col + start, cols, tile, kTransposedCols);
      if (num_rows < kTransposedRows || cols < padded) {
        pad_tile(num_rows, cols, kTransposedRows, padded, tile, kTransposedCols);
      }
      for (int64_t k = 0; k < padded; k += kPanelStep) {
        transpose_pairs(tile + k, kTransposedCols, panel + (start + k) * kPanelColumns + 2 * column, 2 * kPanelColumns);
      }
    }
  }
}

void decode_panels(const EncodedMatrix& matrix, int64_t first_row, int64_t depth, int64_t first_col, Bf16* panels) {
  alignas(64) Bf16 tile[kStraightRows * kStraightCols];
  const int64_t cols = std::min(kStraightCols, matrix.cols - first_col);
  const int64_t panel_size = round_up(depth, kPanelStep) * kPanelColumns;
  for (int64_t start = 0; start < depth; start += kStraightRows) {
    const int64_t num_rows = std::min(kStraightRows, depth - start);
    decode_tile(matrix, first_row + start, num_rows, first_col, cols, tile, kStraightCols);
    if (num_rows < kStraightRows || cols < kStraightCols) {
      pad_tile(num_rows, cols, kStraightRows, kStraightCols, tile, kStraightCols);
    }
    for (int64_t i = 0; i < kPanelsAtOnce; ++i) {
      interleave_rows(tile + i * kPanelColumns, kStraightCols, kStraightRows,
                      panels + i * panel_size + start * kPanelColumns);
    }
  }
}

void pack_panel(const Bf16* rows, int64_t stride, int64_t depth, int64_t cols, Bf16* panel) {
  const int64_t whole = cols == kPanelColumns ? depth / kPanelStep * kPanelStep : 0;
  interleave_rows(rows, stride, whole, panel);
  alignas(64) Bf16 tile[kPanelStep * kPanelColumns];
  for (int64_t start = whole; start < depth; start += kPanelStep) {
    const int64_t num_rows = std::min(kPanelStep, depth - start);
    for (int64_t row = 0; row < num_rows; ++row) {
      std::copy_n(rows + (start + row) * stride, cols, tile + row * kPanelColumns);
    }
    pad_tile(num_rows, cols, kPanelStep, kPanelColumns, tile, kPanelColumns);
    interleave_rows(tile, kPanelColumns, kPanelStep, panel + start * kPanelColumns);
  }
}

void transpose_columns(const Bf16* rows, int64_t stride, int64_t num_rows, int64_t cols, Bf16* to, int64_t to_stride) {
  alignas(64) Bf16 panel[kPanelStep * kPanelColumns];
  for (int64_t start = 0; start < num_rows; start += kPanelStep) {
    pack_panel(rows + start * stride, stride, std::min(kPanelStep, num_rows - start), cols, panel);
    for (int64_t column = 0; column < kPanelColumns; column += kTransposedRows) {  // pairs are what is transposed
      transpose_pairs(panel + 2 * column, 2 * kPanelColumns, to + column * to_stride + start, to_stride);
    }
  }
}

USAF_CLONES void round_tile(const float* from, int64_t from_stride, int64_t num_rows, int64_t cols, Bf16* to,
                            int64_t to_stride) {
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t c = 0; c < cols; ++c) to[row * to_stride + c] = to_bf16(from[row * from_stride + c]);
  }
}

USAF_CLONES void add_scaled_row(const float* from, float scale, int64_t cols, float* to) {
  for (int64_t c = 0; c < cols; ++c) to[c] += scale * from[c];
}

}  // namespace usaf::cpu

#ifdef USAF_HAS_ISA_LEVELS
#pragma GCC diagnostic pop
#endif

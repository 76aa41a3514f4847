// Panels: 64 columns of a GEMM's right-hand matrix B, small enough to be multiplied while they are in the L2 cache.
// Weights are decoded to bf16 panels straight from an expert's page and never reach memory.
//
// Element (k, c) of a panel stands at (k / 2) * 128 + 2 * c + k % 2: pairs along the depth lie together, as dot-product
// instructions on bf16 pairs (AVX512_BF16, AMX) want them ("VNNI" order). Needs AVX-512; see panels_supported().
#pragma once
#include <cstdint>

#include "../numerics/bfloat16.h"
#include "../numerics/formats.h"

namespace usaf::cpu {

inline constexpr int64_t kPanelColumns = 64;
inline constexpr int64_t kPanelStep = 32;  // a panel's depth is padded to a multiple of this, with zeros

// Encoded rows that stand in for rows of a matrix: row `source[i]` of codes and absmax for row `target[i]`.
struct RowOverlay {
  const uint8_t* codes = nullptr;
  const void* absmax = nullptr;
  const int64_t* source = nullptr;
  const int64_t* target = nullptr;  // ascending
  int64_t count = 0;
};

// One encoded matrix [num_rows, cols] of an expert: the rows of its page, and those that replace some of them.
struct EncodedMatrix {
  Format format;
  int64_t num_rows, cols;
  const uint8_t* codes;
  const void* absmax;
  RowOverlay overlays[2];  // the second wins
};

// Whether this CPU has what the functions below are written for (isa.h).
bool panels_supported();

// B = matrix^T: columns are the rows [first_row, first_row + 64) of the matrix, the depth is its columns
// [first_col, first_col + depth). Rows past the end become zeros. first_col is a multiple of 64.
// panel: round_up(depth, 32) * 64 elements.
void decode_transposed_panel(const EncodedMatrix& matrix, int64_t first_row, int64_t first_col, int64_t depth,
                             Bf16* panel);

inline constexpr int64_t kPanelsAtOnce = 2;

// B = matrix: two panels of its columns [first_col, first_col + 128), the depth is its rows
// [first_row, first_row + depth). Columns past the end become zeros. first_col is a multiple of 64.
// panels: 2 * round_up(depth, 32) * 64 elements, one panel after the other.
void decode_panels(const EncodedMatrix& matrix, int64_t first_row, int64_t depth, int64_t first_col, Bf16* panels);

// B = rows: a panel of `cols` <= 64 columns of [depth, ..] rows, `stride` elements apart. Columns past the end become
// zeros. panel: round_up(depth, 32) * 64 elements.
void pack_panel(const Bf16* rows, int64_t stride, int64_t depth, int64_t cols, Bf16* panel);

// to[c, r] = rows[r, c] for `cols` <= 64 columns; r goes on with zeros up to round_up(num_rows, 32), c up to 64.
void transpose_columns(const Bf16* rows, int64_t stride, int64_t num_rows, int64_t cols, Bf16* to, int64_t to_stride);

// to[r, c] = from[r, c], rounded; `cols` columns, strides in elements.
void round_tile(const float* from, int64_t from_stride, int64_t num_rows, int64_t cols, Bf16* to, int64_t to_stride);

// to[c] += scale * from[c], in fp32.
void add_scaled_row(const float* from, float scale, int64_t cols, float* to);

}  // namespace usaf::cpu

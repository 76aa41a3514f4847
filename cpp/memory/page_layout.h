// Where the three matrices of one expert stand inside its page.
//
// A page holds gate, up and down^T, each [intermediate_size, hidden_size], so that neuron j is row j of all three. For
// each matrix: codes [rows, code_bytes], then absmax [rows, num_blocks], both 64-byte aligned. The page is rounded up
// to 4096 bytes: it is read by O_DIRECT and copied in one piece.
#pragma once
#include <cstdint>

#include "../numerics/formats.h"

namespace usaf {

inline constexpr int64_t kPageAlign = 4096;
inline constexpr int kMatricesPerExpert = 3;  // gate, up, down^T
inline constexpr int64_t kMatrixAlign = 64;

struct PageLayout {
  Format format;
  int64_t hidden_size, intermediate_size;
  int64_t codes_offset[kMatricesPerExpert], absmax_offset[kMatricesPerExpert];
  int64_t payload_bytes;  // without the rounding to 4096
  int64_t page_bytes;
};

inline PageLayout make_page_layout(Format format, int64_t hidden_size, int64_t intermediate_size) {
  PageLayout layout{format, hidden_size, intermediate_size, {}, {}, 0, 0};
  int64_t offset = 0;
  for (int matrix = 0; matrix < kMatricesPerExpert; ++matrix) {
    layout.codes_offset[matrix] = offset;
    offset = round_up(offset + intermediate_size * code_bytes(format, hidden_size), kMatrixAlign);
    layout.absmax_offset[matrix] = offset;
    offset =
        round_up(offset + intermediate_size * num_blocks(format, hidden_size) * int64_t{sizeof(float)}, kMatrixAlign);
  }
  layout.payload_bytes = offset;
  layout.page_bytes = round_up(offset, kPageAlign);
  return layout;
}

}  // namespace usaf

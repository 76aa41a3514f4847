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
inline constexpr int64_t kPartAlign = 64;

struct PageLayout {
  Format format;
  int64_t hidden_size, intermediate_size;
  int64_t codes_offset[kMatricesPerExpert], absmax_offset[kMatricesPerExpert];
  int64_t payload_bytes;  // without the rounding to 4096
  int64_t page_bytes;
};

inline PageLayout make_page_layout(Format format, int64_t hidden_size, int64_t intermediate_size) {
  PageLayout layout{format, hidden_size, intermediate_size, {}, {}, 0, 0};
  const int64_t codes = intermediate_size * code_bytes(format, hidden_size);
  const int64_t absmax = intermediate_size * num_blocks(format, hidden_size) * scale_bytes(format);
  const int64_t absmax_begin = round_up(kMatricesPerExpert * codes, kPartAlign);
  for (int matrix = 0; matrix < kMatricesPerExpert; ++matrix) {
    layout.codes_offset[matrix] = matrix * codes;
    layout.absmax_offset[matrix] = absmax_begin + matrix * absmax;
  }
  layout.payload_bytes = round_up(absmax_begin + kMatricesPerExpert * absmax, kPartAlign);
  layout.page_bytes = round_up(layout.payload_bytes, kPageAlign);
  return layout;
}

}  // namespace usaf

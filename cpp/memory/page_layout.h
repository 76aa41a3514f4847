// Where the three matrices of one expert stand inside its page.
//
// Blocks run along rows. gate and up are [intermediate_size, hidden_size], so that neuron j is row j. down stands there
// in one of two ways: transposed, [intermediate_size, hidden_size], so that neuron j is row j of it too (our own
// pages); or as it is, [hidden_size, intermediate_size], so that pages imported from bitsandbytes keep their codes. For
// each matrix: codes [rows, code_bytes], then absmax [rows, num_blocks], both 64-byte aligned. The page is rounded up
// to 4096 bytes: it is read by O_DIRECT and copied in one piece.
#pragma once
#include <cstdint>
#include <string>

#include "../errors.h"
#include "../numerics/formats.h"

namespace usaf {

inline constexpr int64_t kPageAlign = 4096;
inline constexpr int kMatricesPerExpert = 3;  // gate, up, down
inline constexpr int64_t kPartAlign = 64;

// What the rows of down run along.
enum class DownAxis { hidden, intermediate };

struct PageLayout {
  Format format;
  DownAxis down_axis;
  int64_t hidden_size, intermediate_size;
  int64_t rows[kMatricesPerExpert], cols[kMatricesPerExpert];
  int64_t codes_offset[kMatricesPerExpert], absmax_offset[kMatricesPerExpert];
  int64_t payload_bytes;  // without the rounding to 4096
  int64_t page_bytes;
};

// Throws StoreError where bitsandbytes' blocks, which run through a whole matrix, would not be blocks of its rows, and
// for a format that bitsandbytes' codes and scales are not in.
inline PageLayout make_page_layout(Format format, int64_t hidden_size, int64_t intermediate_size,
                                   DownAxis down_axis = DownAxis::hidden) {
  PageLayout layout{format, down_axis, hidden_size, intermediate_size, {}, {}, {}, {}, 0, 0};
  const bool as_it_is = down_axis == DownAxis::intermediate;
  if (as_it_is && format != Format::nf4) {
    throw StoreError(std::string("down_axis 'intermediate': expected the format nf4, got ") + format_name(format));
  }
  if (as_it_is && (hidden_size % kBlockSize != 0 || intermediate_size % kBlockSize != 0)) {
    throw StoreError("down_axis 'intermediate': expected hidden_size and intermediate_size to be multiples of " +
                     std::to_string(kBlockSize) + " (a block would straddle rows), got " + std::to_string(hidden_size) +
                     " and " + std::to_string(intermediate_size));
  }
  int64_t end = 0;
  for (int matrix = 0; matrix < kMatricesPerExpert; ++matrix) {
    const bool turned = as_it_is && matrix == 2;
    layout.rows[matrix] = turned ? hidden_size : intermediate_size;
    layout.cols[matrix] = turned ? intermediate_size : hidden_size;
    layout.codes_offset[matrix] = end;
    end += layout.rows[matrix] * code_bytes(format, layout.cols[matrix]);
  }
  end = round_up(end, kPartAlign);
  for (int matrix = 0; matrix < kMatricesPerExpert; ++matrix) {
    layout.absmax_offset[matrix] = end;
    end += layout.rows[matrix] * num_blocks(format, layout.cols[matrix]) * scale_bytes(format);
  }
  layout.payload_bytes = round_up(end, kPartAlign);
  layout.page_bytes = round_up(layout.payload_bytes, kPageAlign);
  return layout;
}

}  // namespace usaf

// The importance of neurons from tiles of their gradients: what both ways to compute row_importance share.
#pragma once
#include <cstdint>

#include "../numerics/bfloat16.h"
#include "../numerics/float16.h"

namespace usaf::cpu {

// A tile of fp32 gradients, row by row, and the weights they belong to (null: g^2 is summed, not |g * w|). Strides in
// elements.
template <class T>
struct ImportanceTile {
  const float* gradient;
  int64_t stride;
  const T* weights;
  int64_t weights_stride;
  int64_t num_rows, num_columns;
};

// sums[r] += row r's sum: in fp32 within the tile (lanes, their tree, then the tail), in double from tile to tile.
void add_importance(const ImportanceTile<float>& tile, double* sums);
void add_importance(const ImportanceTile<Bf16>& tile, double* sums);
void add_importance(const ImportanceTile<F16>& tile, double* sums);

}  // namespace usaf::cpu

// Gradients of a few neurons of one expert: for each, three rows of length hidden, a dot product over the expert's
// tokens at every column. Gate and up rows are sums over x, down rows over grad_out.
//
// A block of columns is summed at a time, so that its sums stay in the L1 cache while the tokens pass by; a group of
// tokens is added at a time, so that sums are loaded and stored once for the group. Sums run over the tokens in
// ascending order, from zero, in fp32: neither blocks nor groups change their bits.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../numerics/bfloat16.h"
#include "../numerics/float16.h"

namespace usaf::cpu {

inline constexpr int64_t kNeurons = 8;  // of a block
inline constexpr int64_t kRowTile = 8;  // rows of the result whose sums are in registers
inline constexpr int64_t kTokenGroup = 8;
inline constexpr int64_t kBlockColumns = 512;

// A group of tokens, for `num_rows` rows of sums in tiles of kRowTile.
template <class T>
struct TokenGroup {
  const T* rows;  // of the tokens, `stride` elements apart
  int64_t stride;
  const float* coefficient;  // tile i's, [num_tokens, kRowTile], at i * tile_stride
  int64_t tile_stride;
  int64_t num_tokens, num_ahead;  // num_ahead: tokens of the next group, to be fetched into the cache
  int64_t num_rows, num_columns;
};

// sums[r * kBlockColumns + c] += the sum over the tokens of coefficient(token, r) * rows[token * stride + c] for
// num_columns <= kBlockColumns columns c. Rows of the last tile past num_rows may be added too.
void add_tokens(const TokenGroup<float>& group, float* sums);
void add_tokens(const TokenGroup<Bf16>& group, float* sums);
void add_tokens(const TokenGroup<F16>& group, float* sums);

// What the launchers share: the pointers, typed.
template <class T>
struct GradientOperands {
  const T *x, *grad_out, *grad_gate_up, *weighted_h;
  int64_t hidden_size, intermediate_size;

  template <class Args>
  explicit GradientOperands(const Args& args)
      : x(static_cast<const T*>(args.x)),
        grad_out(static_cast<const T*>(args.grad_out)),
        grad_gate_up(static_cast<const T*>(args.grad_gate_up)),
        weighted_h(static_cast<const T*>(args.weighted_h)),
        hidden_size(args.hidden_size),
        intermediate_size(args.intermediate_size) {}

  // Columns [first_column, end_column) of the gradients of `count` <= kNeurons neurons of one expert, whose tokens are
  // rows [first, first + num_tokens): calls use(matrix, column, num_columns, sums) for every matrix and block of
  // columns; neuron n's are at sums + n * kBlockColumns.
  template <class Use>
  void for_each_block(const int32_t* neurons, int64_t count, int64_t first, int64_t num_tokens, int64_t first_column,
                      int64_t end_column, const Use& use) const {
    std::vector<float> coefficient;  // [row tile, token, row of the tile]
    alignas(64) float sums[2 * kNeurons * kBlockColumns];
    for (const int first_matrix : {0, 2}) {
      const int num_matrices = first_matrix == 0 ? 2 : 1;
      const int64_t num_rows = num_matrices * count, num_tiles = (num_rows + kRowTile - 1) / kRowTile;
      const int64_t tile_size = num_tokens * kRowTile;
      coefficient.assign(static_cast<size_t>(num_tiles * tile_size), 0.0f);
      const T* from = (first_matrix == 0 ? grad_gate_up : weighted_h) + first * num_matrices * intermediate_size;
      for (int64_t token = 0; token < num_tokens; ++token) {
        for (int64_t row = 0; row < num_rows; ++row) {
          const int64_t column = row < count ? neurons[row] : intermediate_size + neurons[row - count];
          coefficient[static_cast<size_t>(row / kRowTile * tile_size + token * kRowTile + row % kRowTile)] =
              to_float(from[token * num_matrices * intermediate_size + column]);
        }
      }
      const T* rows = (first_matrix == 0 ? x : grad_out) + first * hidden_size;
      for (int64_t column = first_column; column < end_column; column += kBlockColumns) {
        const int64_t num_columns = std::min(kBlockColumns, end_column - column);
        std::fill_n(sums, num_tiles * kRowTile * kBlockColumns, 0.0f);
        for (int64_t token = 0; token < num_tokens; token += kTokenGroup) {
          const int64_t group = std::min(kTokenGroup, num_tokens - token);
          const int64_t ahead = std::min(kTokenGroup, num_tokens - token - group);
          add_tokens(
              TokenGroup<T>{rows + token * hidden_size + column, hidden_size, coefficient.data() + token * kRowTile,
                            tile_size, group, ahead, num_rows, num_columns},
              sums);
        }
        for (int i = 0; i < num_matrices; ++i) {
          use(first_matrix + i, column, num_columns, sums + i * count * kBlockColumns);
        }
      }
    }
  }
};

}  // namespace usaf::cpu

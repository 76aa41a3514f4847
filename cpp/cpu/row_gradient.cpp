// Gradients of single neurons (gradient_block.h), added to the result and rounded once; the squares of its rows.
#include <algorithm>
#include <vector>

#include "../kernel_api.h"
#include "gradient_block.h"
#include "parallel.h"
#include "simd.h"
#include "typed.h"

namespace usaf::cpu {
namespace {

constexpr int64_t kStrip = 2 * kLanes;  // columns whose sums are in registers

// One strip of one tile.
template <int64_t kRows, class T>
USAF_ALWAYS_INLINE void add_strip(const T* rows, int64_t stride, const float* coefficient, int64_t num_tokens,
                                  float* sums) {
  Lanes sum[kRows][2];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
    load_lanes(sums + r * kBlockColumns, sum[r][0]);
    load_lanes(sums + r * kBlockColumns + kLanes, sum[r][1]);
  }
  for (int64_t token = 0; token < num_tokens; ++token) {
    Lanes low, high;
    load_lanes(rows + token * stride, low);
    load_lanes(rows + token * stride + kLanes, high);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      sum[r][0] += coefficient[token * kRowTile + r] * low;
      sum[r][1] += coefficient[token * kRowTile + r] * high;
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
    store_lanes(sum[r][0], sums + r * kBlockColumns);
    store_lanes(sum[r][1], sums + r * kBlockColumns + kLanes);
  }
}

template <class T>
USAF_ALWAYS_INLINE void add_group(const TokenGroup<T>& group, float* sums) {
  int64_t column = 0;
  for (; column + kStrip <= group.num_columns; column += kStrip) {
    const T* rows = group.rows + column;
    for (int64_t token = 0; token < group.num_ahead; ++token) {
      __builtin_prefetch(rows + (group.num_tokens + token) * group.stride, 0, 2);
    }
    for (int64_t row = 0; row < group.num_rows; row += kRowTile) {
      const float* coefficient = group.coefficient + row / kRowTile * group.tile_stride;
      float* tile = sums + row * kBlockColumns + column;
      if (group.num_rows - row > kRowTile / 2) {
        add_strip<kRowTile>(rows, group.stride, coefficient, group.num_tokens, tile);
      } else {
        add_strip<kRowTile / 2>(rows, group.stride, coefficient, group.num_tokens, tile);
      }
    }
  }
  for (int64_t row = 0; row < group.num_rows; ++row) {
    const float* coefficient = group.coefficient + row / kRowTile * group.tile_stride + row % kRowTile;
    for (int64_t token = 0; token < group.num_tokens; ++token) {
      for (int64_t c = column; c < group.num_columns; ++c) {
        sums[row * kBlockColumns + c] += coefficient[token * kRowTile] * to_float(group.rows[token * group.stride + c]);
      }
    }
  }
}

// Up to kNeurons neurons of one expert.
struct NeuronBlock {
  int64_t expert, first, count;
};

template <class T>
USAF_ALWAYS_INLINE void add_lanes(T* row, const float* sum, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Lanes lanes, more;
    load_lanes(row + i, lanes);
    load_lanes(sum + i, more);
    store_lanes(lanes + more, row + i);
  }
  for (; i < count; ++i) row[i] = from_float<T>(to_float(row[i]) + sum[i]);
}

USAF_CLONES void add_to(float* row, const float* sum, int64_t count) { add_lanes(row, sum, count); }
USAF_CLONES void add_to(Bf16* row, const float* sum, int64_t count) { add_lanes(row, sum, count); }
USAF_CLONES void add_to(F16* row, const float* sum, int64_t count) { add_lanes(row, sum, count); }

using DoubleLanes = double __attribute__((vector_size(8 * kLanes)));

// In double, lane by lane, then the lanes in ascending order, then the tail.
template <class T>
USAF_ALWAYS_INLINE double sum_of_squares(const T* row, int64_t count) {
  DoubleLanes sum = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Lanes lanes;
    load_lanes(row + i, lanes);
    const DoubleLanes wide = __builtin_convertvector(lanes, DoubleLanes);
    sum += wide * wide;
  }
  double total = 0.0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += sum[lane];
  for (; i < count; ++i) total += static_cast<double>(to_float(row[i])) * static_cast<double>(to_float(row[i]));
  return total;
}

USAF_CLONES double row_square(const float* row, int64_t count) { return sum_of_squares(row, count); }
USAF_CLONES double row_square(const Bf16* row, int64_t count) { return sum_of_squares(row, count); }
USAF_CLONES double row_square(const F16* row, int64_t count) { return sum_of_squares(row, count); }

}  // namespace

USAF_CLONES void add_tokens(const TokenGroup<float>& group, float* sums) { add_group(group, sums); }
USAF_CLONES void add_tokens(const TokenGroup<Bf16>& group, float* sums) { add_group(group, sums); }
USAF_CLONES void add_tokens(const TokenGroup<F16>& group, float* sums) { add_group(group, sums); }

void row_gradient(const RowGradientArgs& args, void*) {
  const int32_t* experts_end = args.neuron_expert + args.num_neurons;
  const int32_t* begin = std::lower_bound(args.neuron_expert, experts_end, static_cast<int32_t>(args.first_expert));
  std::vector<NeuronBlock> blocks;
  int64_t neuron = begin - args.neuron_expert;
  while (neuron < args.num_neurons && args.neuron_expert[neuron] < args.first_expert + args.num_experts) {
    int64_t count = 1;
    while (count < kNeurons && neuron + count < args.num_neurons &&
           args.neuron_expert[neuron + count] == args.neuron_expert[neuron]) {
      ++count;
    }
    blocks.push_back({args.neuron_expert[neuron] - args.first_expert, neuron, count});
    neuron += count;
  }
  if (blocks.empty() || args.hidden_size == 0) return;
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());
  // Few blocks: their columns are shared out too.
  const int64_t columns = num_blocks < 4 * max_workers() ? kBlockColumns : args.hidden_size;
  const int64_t parts = (args.hidden_size + columns - 1) / columns;
  const int64_t tokens_per_expert = (args.offsets[args.num_experts] - args.offsets[0]) / args.num_experts + 1;
  with_type(args.dtype, [&]<class T>(T) {
    const GradientOperands<T> operands(args);
    parallel_for_uneven(num_blocks * parts, 3 * columns * tokens_per_expert, [&](int64_t item) {
      const NeuronBlock& block = blocks[static_cast<size_t>(item / parts)];
      const int64_t first_column = item % parts * columns;
      const int64_t first = args.offsets[block.expert] - args.offsets[0];
      const int64_t num_tokens = args.offsets[block.expert + 1] - args.offsets[block.expert];
      if (num_tokens == 0) return;
      operands.for_each_block(args.neuron_index + block.first, block.count, first, num_tokens, first_column,
                              std::min(first_column + columns, args.hidden_size),
                              [&](int matrix, int64_t column, int64_t num_columns, const float* sums) {
                                with_type(args.grad_dtype, [&]<class G>(G) {
                                  for (int64_t n = 0; n < block.count; ++n) {
                                    const int64_t row = (block.first + n) * 3 + matrix;
                                    add_to(static_cast<G*>(args.grad) + row * args.hidden_size + column,
                                           sums + n * kBlockColumns, num_columns);
                                  }
                                });
                              });
    });
  });
}

void squares_of_rows(const SquaresOfRowsArgs& args, void*) {
  with_type(args.dtype, [&]<class T>(T) {
    const T* rows = static_cast<const T*>(args.rows);
    parallel_for(args.num_rows, args.cols,
                 [&](int64_t r) { args.squares[r] = row_square(rows + r * args.cols, args.cols); });
  });
}

}  // namespace usaf::cpu

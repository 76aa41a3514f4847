// Gradients of single neurons: for each, three rows of length hidden, a dot product over the expert's tokens at every
// column. A register tile of kNeurons x (2 * 16) columns reads each token once for all its neurons.
//
// Sums run over the tokens in ascending order, from zero, in fp32; then they are added to the result and rounded once
// (or, for the importance, reduced into it). Neither tiles nor threads change the order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../kernel_api.h"
#include "parallel.h"
#include "simd.h"
#include "typed.h"

namespace usaf::cpu {
namespace {

constexpr int64_t kNeurons = 4;
constexpr int64_t kColumns = 2 * kLanes;

using GradientTile = float[kNeurons][kColumns];

// tile[n][c] = sum over tokens of coefficient[token * kNeurons + n] * rows[token * stride + c].
template <class T>
USAF_ALWAYS_INLINE void full_tile(const float* coefficient, const T* rows, int64_t stride, int64_t num_tokens,
                                  GradientTile& tile) {
  Lanes sum[kNeurons][2] = {};
  for (int64_t token = 0; token < num_tokens; ++token) {
    Lanes low, high;
    load_lanes(rows + token * stride, low);
    load_lanes(rows + token * stride + kLanes, high);
#pragma GCC unroll 4
    for (int64_t n = 0; n < kNeurons; ++n) {
      sum[n][0] += coefficient[token * kNeurons + n] * low;
      sum[n][1] += coefficient[token * kNeurons + n] * high;
    }
  }
  std::memcpy(tile, sum, sizeof tile);
}

USAF_CLONES void gradient_tile(const float* coefficient, const float* rows, int64_t stride, int64_t num_tokens,
                               GradientTile& tile) {
  full_tile(coefficient, rows, stride, num_tokens, tile);
}
USAF_CLONES void gradient_tile(const float* coefficient, const Bf16* rows, int64_t stride, int64_t num_tokens,
                               GradientTile& tile) {
  full_tile(coefficient, rows, stride, num_tokens, tile);
}
USAF_CLONES void gradient_tile(const float* coefficient, const F16* rows, int64_t stride, int64_t num_tokens,
                               GradientTile& tile) {
  full_tile(coefficient, rows, stride, num_tokens, tile);
}

template <class T>
void tail_tile(const float* coefficient, const T* rows, int64_t stride, int64_t num_tokens, int64_t num_columns,
               GradientTile& tile) {
  for (int64_t n = 0; n < kNeurons; ++n) {
    for (int64_t c = 0; c < num_columns; ++c) {
      float sum = 0.0f;
      for (int64_t token = 0; token < num_tokens; ++token) {
        sum += coefficient[token * kNeurons + n] * to_float(rows[token * stride + c]);
      }
      tile[n][c] = sum;
    }
  }
}

// What the two launchers share: the pointers, typed.
template <class T>
struct Operands {
  const T *x, *grad_out, *grad_gate_up, *weighted_h;
  int64_t hidden_size, intermediate_size;

  template <class Args>
  explicit Operands(const Args& args)
      : x(static_cast<const T*>(args.x)),
        grad_out(static_cast<const T*>(args.grad_out)),
        grad_gate_up(static_cast<const T*>(args.grad_gate_up)),
        weighted_h(static_cast<const T*>(args.weighted_h)),
        hidden_size(args.hidden_size),
        intermediate_size(args.intermediate_size) {}

  // Calls use(matrix, first_column, num_columns, tile) for every tile of the gradients of `count` <= kNeurons neurons
  // of one expert, whose tokens are rows [first, first + num_tokens). `coefficient` is scratch.
  template <class Use>
  void for_each_tile(const int32_t* neurons, int64_t count, int64_t first, int64_t num_tokens,
                     std::vector<float>& coefficient, const Use& use) const {
    coefficient.assign(static_cast<size_t>(num_tokens * kNeurons), 0.0f);
    for (int matrix = 0; matrix < 3; ++matrix) {
      const T* from = matrix == 2 ? weighted_h : grad_gate_up + matrix * intermediate_size;
      const int64_t from_stride = matrix == 2 ? intermediate_size : 2 * intermediate_size;
      for (int64_t token = 0; token < num_tokens; ++token) {
        for (int64_t n = 0; n < count; ++n) {
          coefficient[static_cast<size_t>(token * kNeurons + n)] =
              to_float(from[(first + token) * from_stride + neurons[n]]);
        }
      }
      const T* rows = (matrix == 2 ? grad_out : x) + first * hidden_size;
      GradientTile tile;
      for (int64_t column = 0; column < hidden_size; column += kColumns) {
        const int64_t num_columns = std::min(kColumns, hidden_size - column);
        if (num_columns == kColumns) {
          gradient_tile(coefficient.data(), rows + column, hidden_size, num_tokens, tile);
        } else {
          tail_tile(coefficient.data(), rows + column, hidden_size, num_tokens, num_columns, tile);
        }
        use(matrix, column, num_columns, tile);
      }
    }
  }
};

// Up to kNeurons neurons of one expert.
struct NeuronBlock {
  int64_t expert, first, count;
};

template <class T>
void add_to(T* row, const float* sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) row[i] = from_float<T>(to_float(row[i]) + sum[i]);
}

template <class T>
float sum_of_magnitudes(const float* gradient, const T* weight, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += std::fabs(gradient[i] * to_float(weight[i]));
  return sum;
}

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
  const int64_t tokens_per_expert =
      args.num_experts == 0 ? 0 : (args.offsets[args.num_experts] - args.offsets[0]) / args.num_experts + 1;
  with_type(args.dtype, [&]<class T>(T) {
    const Operands<T> operands(args);
    parallel_for_uneven(static_cast<int64_t>(blocks.size()), 3 * args.hidden_size * tokens_per_expert, [&](int64_t b) {
      const NeuronBlock& block = blocks[static_cast<size_t>(b)];
      const int64_t first = args.offsets[block.expert] - args.offsets[0];
      const int64_t num_tokens = args.offsets[block.expert + 1] - args.offsets[block.expert];
      if (num_tokens == 0) return;
      std::vector<float> coefficient;
      operands.for_each_tile(args.neuron_index + block.first, block.count, first, num_tokens, coefficient,
                             [&](int matrix, int64_t column, int64_t num_columns, const GradientTile& tile) {
                               with_type(args.grad_dtype, [&]<class G>(G) {
                                 for (int64_t n = 0; n < block.count; ++n) {
                                   const int64_t row = (block.first + n) * 3 + matrix;
                                   add_to(static_cast<G*>(args.grad) + row * args.hidden_size + column, tile[n],
                                          num_columns);
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

void row_importance(const RowImportanceArgs& args, void*) {
  const int64_t blocks_per_expert = (args.intermediate_size + kNeurons - 1) / kNeurons;
  with_type(args.dtype, [&]<class T>(T) {
    const Operands<T> operands(args);
    const T* weights = static_cast<const T*>(args.weights);
    parallel_for_uneven(args.num_experts * blocks_per_expert, 3 * args.hidden_size * kNeurons, [&](int64_t b) {
      const int64_t expert = b / blocks_per_expert, neuron = b % blocks_per_expert * kNeurons;
      const int64_t count = std::min(kNeurons, args.intermediate_size - neuron);
      const int64_t first = args.offsets[expert] - args.offsets[0];
      const int64_t num_tokens = args.offsets[expert + 1] - args.offsets[expert];
      if (num_tokens == 0) return;
      int32_t neurons[kNeurons];
      for (int64_t n = 0; n < count; ++n) neurons[n] = static_cast<int32_t>(neuron + n);
      double sum[kNeurons] = {};
      std::vector<float> coefficient;
      operands.for_each_tile(
          neurons, count, first, num_tokens, coefficient,
          [&](int matrix, int64_t column, int64_t num_columns, const GradientTile& tile) {
            const int64_t row = (expert * 3 + matrix) * args.intermediate_size + neuron;
            for (int64_t n = 0; n < count; ++n) {
              sum[n] += static_cast<double>(
                  weights == nullptr
                      ? dot(tile[n], tile[n], num_columns)
                      : sum_of_magnitudes(tile[n], weights + (row + n) * args.hidden_size + column, num_columns));
            }
          });
      float* importance = args.importance + expert * args.intermediate_size + neuron;
      for (int64_t n = 0; n < count; ++n) importance[n] += static_cast<float>(sum[n]);
    });
  });
}

}  // namespace usaf::cpu

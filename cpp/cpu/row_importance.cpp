// Importance of every neuron: its gradients (gradient_block.h), reduced block by block. For any dtype and CPU.
#include <algorithm>
#include <cmath>

#include "../kernel_api.h"
#include "gradient_block.h"
#include "importance.h"
#include "parallel.h"
#include "simd.h"
#include "typed.h"

namespace usaf::cpu {
namespace {

template <class T>
USAF_ALWAYS_INLINE float sum_of_magnitudes(const float* gradient, const T* weights, int64_t count) {
  Lanes sum = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Lanes left, right;
    load_lanes(gradient + i, left);
    load_lanes(weights + i, right);
    const Lanes product = left * right;
    Words bits;
    std::memcpy(&bits, &product, sizeof bits);
    bits &= 0x7fffffffu;
    Lanes magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    sum += magnitude;
  }
  float total = sum_lanes(sum);
  for (; i < count; ++i) total += std::fabs(gradient[i] * to_float(weights[i]));
  return total;
}

template <class T>
USAF_ALWAYS_INLINE void add_rows(const ImportanceTile<T>& tile, double* sums) {
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const float* gradient = tile.gradient + row * tile.stride;
    sums[row] += static_cast<double>(
        tile.weights == nullptr
            ? dot(gradient, gradient, tile.num_columns)
            : sum_of_magnitudes(gradient, tile.weights + row * tile.weights_stride, tile.num_columns));
  }
}

}  // namespace

USAF_CLONES void add_importance(const ImportanceTile<float>& tile, double* sums) { add_rows(tile, sums); }
USAF_CLONES void add_importance(const ImportanceTile<Bf16>& tile, double* sums) { add_rows(tile, sums); }
USAF_CLONES void add_importance(const ImportanceTile<F16>& tile, double* sums) { add_rows(tile, sums); }

void row_importance(const RowImportanceArgs& args, void*) {
  const int64_t blocks_per_expert = (args.intermediate_size + kNeurons - 1) / kNeurons;
  with_type(args.dtype, [&]<class T>(T) {
    const GradientOperands<T> operands(args);
    const T* weights = static_cast<const T*>(args.weights);
    parallel_for_uneven(args.num_experts * blocks_per_expert, 3 * args.hidden_size * kNeurons, [&](int64_t b) {
      const int64_t expert = b / blocks_per_expert, neuron = b % blocks_per_expert * kNeurons;
      const int64_t count = std::min(kNeurons, args.intermediate_size - neuron);
      const int64_t first = args.offsets[expert] - args.offsets[0];
      const int64_t num_tokens = args.offsets[expert + 1] - args.offsets[expert];
      if (num_tokens == 0) return;
      int32_t neurons[kNeurons];
      for (int64_t n = 0; n < count; ++n) neurons[n] = static_cast<int32_t>(neuron + n);
      double sums[kNeurons] = {};
      operands.for_each_block(
          neurons, count, first, num_tokens, 0, args.hidden_size,
          [&](int matrix, int64_t column, int64_t num_columns, const float* gradient) {
            const int64_t row = (expert * 3 + matrix) * args.intermediate_size + neuron;
            add_importance(ImportanceTile<T>{gradient, kBlockColumns,
                                             weights == nullptr ? nullptr : weights + row * args.hidden_size + column,
                                             args.hidden_size, count, num_columns},
                           sums);
          });
      float* importance = args.importance + expert * args.intermediate_size + neuron;
      for (int64_t n = 0; n < count; ++n) importance[n] += static_cast<float>(sums[n]);
    });
  });
}

}  // namespace usaf::cpu

// Gradients of single neurons on NVIDIA GPUs, their importance, and the rows' sums of squares.
//
// A neuron's gradient is three rows of length hidden, each a dot product over its expert's tokens at every column. A
// block takes up to eight neurons of one expert and a stretch of columns, 16 bytes a thread: 32 tokens' coefficients
// are staged in shared memory as fp32, where a warp reads them by broadcast, and every pack of a token's row is used by
// all eight neurons. One launch covers all experts: a block finds its expert's neurons in the ascending list by itself
// (32 probes at a time), and reads the token offsets on the device. Sums run over the tokens in ascending order, from
// zero, in fp32, multiply and add apart; then they are added to the result and rounded once. The importance adds
// squares or magnitudes over a thread's columns in fp32, then threads, lanes and warps in double, in an order that the
// sizes alone decide. Work: 2 * 3 * hidden flops a (token, neuron); bytes: the rows of x and grad_out once a group of
// eight neurons.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "kernel_api.h"
#include "launch.h"
#include "numerics/block_scale.h"
#include "numerics/two_float.h"
#include "pack.h"

namespace usaf::gpu {
namespace {

constexpr int kTileThreads = 128;
constexpr int kTileWarps = kTileThreads / 32;
constexpr int kNeurons = 8;
constexpr int kTokens = 32;     // whose coefficients are staged together
constexpr int kInFlight = 4;    // tokens whose packs are on their way
constexpr int kMaxGroups = 16;  // of an expert's neurons in different blocks

// A group of neurons of one expert: rows [first_token, first_token + num_tokens) are the expert's.
struct Group {
  int64_t first_token, num_tokens;
  int count;  // neurons
};

struct alignas(16) Staged {
  float coefficient[kTokens][kNeurons];
};

template <class T>
__device__ __forceinline__ float load_value(const T* at) {
  if constexpr (sizeof(T) == 4)
    return __ldg(at);
  else
    return to_float(T{__ldg(reinterpret_cast<const unsigned short*>(at))});
}

// sum[n][i] = the gradient of neuron `neuron_index[n]` at column col + i, in matrix 0 (gate), 1 (up) or 2 (down). The
// whole block comes here together.
template <class T, class Args>
__device__ __forceinline__ void gradient_tile(const Args& args, const Group& group, const int (&neuron_index)[kNeurons],
                                              int matrix, int64_t col, bool aligned, Staged& staged,
                                              float (&sum)[kNeurons][kPack<T>]) {
  const int64_t hidden = args.hidden_size, width = args.intermediate_size;
  const int64_t stride = matrix == 2 ? width : 2 * width;
  const T* from =
      matrix == 2 ? static_cast<const T*>(args.weighted_h) : static_cast<const T*>(args.grad_gate_up) + matrix * width;
  from += group.first_token * stride;
  const T* rows = static_cast<const T*>(matrix == 2 ? args.grad_out : args.x) + group.first_token * hidden;
#pragma unroll
  for (int n = 0; n < kNeurons; ++n) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) sum[n][i] = 0.0f;
  }
  for (int64_t tile = 0; tile < group.num_tokens; tile += kTokens) {
    __syncthreads();  // the last tile, or the neurons' numbers
    for (int i = static_cast<int>(threadIdx.x); i < kTokens * kNeurons; i += kTileThreads) {
      const int n = i % kNeurons;
      const int64_t token = tile + i / kNeurons;
      const bool live = n < group.count && token < group.num_tokens;
      staged.coefficient[i / kNeurons][n] = live ? load_value(from + token * stride + neuron_index[n]) : 0.0f;
    }
    __syncthreads();
    if (col >= hidden) continue;
    const int count = static_cast<int>(group.num_tokens - tile < kTokens ? group.num_tokens - tile : kTokens);
    for (int first = 0; first < count; first += kInFlight) {
      uint4 pack[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j < count)
          pack[j] = load_pack(rows + (tile + first + j) * hidden, col, hidden, is_whole<T>(col, hidden, aligned));
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j >= count) continue;
        float value[kPack<T>];
        unpack(pack[j], value, T{});
#pragma unroll
        for (int n = 0; n < kNeurons; ++n) {
          const float coefficient = staged.coefficient[first + j][n];
#pragma unroll
          for (int i = 0; i < kPack<T>; ++i) sum[n][i] += coefficient * value[i];
        }
      }
    }
  }
}

// How many of the ascending values are below `bound`: a warp asks at 32 places at a time.
__device__ __forceinline__ int64_t count_below(const int32_t* values, int64_t count, int64_t bound) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t step = (count + 31) / 32, probe = threadIdx.x % 32 * step;
    const bool below = probe < count && __ldg(values + low + probe) < bound;
    const int hits = __popc(__ballot_sync(kFullWarp, below));
    if (hits == 0) break;
    const int64_t passed = (hits - 1) * step + 1;  // the last hit and all before it
    low += passed;
    count = count - passed < step - 1 ? count - passed : step - 1;
  }
  return low;
}

// row[col + i] += sum[i], rounded once.
template <class T, class G>
__device__ __forceinline__ void add_columns(G* row, int64_t col, int64_t cols, bool aligned,
                                            const float (&sum)[kPack<T>]) {
  if constexpr (kPack<T> % kPack<G> == 0) {
    const bool whole = is_whole<T>(col, cols, aligned);
#pragma unroll
    for (int part = 0; part < kPack<T>; part += kPack<G>) {
      float value[kPack<G>];
      unpack(load_plain_pack(row, col + part, cols, whole), value, G{});
#pragma unroll
      for (int i = 0; i < kPack<G>; ++i) value[i] += sum[part + i];
      store_pack(row, col + part, cols, whole, repack(value, G{}));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (col + i < cols) row[col + i] = from_float<G>(to_float(row[col + i]) + sum[i]);
    }
  }
}

// blockIdx.x: a stretch of columns of one of the three matrices; y: an expert; z: which of its groups of neurons.
template <class T, class G>
__global__ void __launch_bounds__(kTileThreads, 3)
    row_gradient_kernel(RowGradientArgs args, bool aligned, bool grad_aligned) {
  __shared__ Staged staged;
  __shared__ int neuron_index[kNeurons];
  const int matrix = static_cast<int>(blockIdx.x % 3);
  const int64_t col = (int64_t{blockIdx.x / 3} * kTileThreads + threadIdx.x) * kPack<T>;
  for (int64_t expert = blockIdx.y; expert < args.num_experts; expert += gridDim.y) {
    const int32_t begin = __ldg(args.offsets + expert), end = __ldg(args.offsets + expert + 1);
    if (begin == end) continue;
    const int64_t number = args.first_expert + expert;
    const int64_t first = count_below(args.neuron_expert, args.num_neurons, number);
    const int64_t last = first + count_below(args.neuron_expert + first, args.num_neurons - first, number + 1);
    for (int64_t neuron = first + blockIdx.z * kNeurons; neuron < last; neuron += int64_t{gridDim.z} * kNeurons) {
      const Group group = {begin - __ldg(args.offsets), end - begin,
                           static_cast<int>(last - neuron < kNeurons ? last - neuron : kNeurons)};
      __syncthreads();  // the last group has read its neurons' numbers
      if (static_cast<int>(threadIdx.x) < group.count)
        neuron_index[threadIdx.x] = __ldg(args.neuron_index + neuron + threadIdx.x);
      float sum[kNeurons][kPack<T>];
      gradient_tile<T>(args, group, neuron_index, matrix, col, aligned, staged, sum);
      if (col >= args.hidden_size) continue;
#pragma unroll
      for (int n = 0; n < kNeurons; ++n) {
        if (n >= group.count) continue;
        G* row = static_cast<G*>(args.grad) + ((neuron + n) * 3 + matrix) * args.hidden_size;
        add_columns<T>(row, col, args.hidden_size, grad_aligned, sum[n]);
      }
    }
  }
}

// blockIdx.x: a group of neurons; y: an expert.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 3) row_importance_kernel(RowImportanceArgs args, bool aligned) {
  __shared__ Staged staged;
  __shared__ int neuron_index[kNeurons];
  __shared__ double part[kTileWarps][kNeurons];
  const int64_t hidden = args.hidden_size, width = args.intermediate_size;
  const int64_t neuron = int64_t{blockIdx.x} * kNeurons;
  const int count = static_cast<int>(width - neuron < kNeurons ? width - neuron : kNeurons);
  if (threadIdx.x < kNeurons) neuron_index[threadIdx.x] = static_cast<int>(neuron + threadIdx.x);
  for (int64_t expert = blockIdx.y; expert < args.num_experts; expert += gridDim.y) {
    const int32_t begin = __ldg(args.offsets + expert), end = __ldg(args.offsets + expert + 1);
    if (begin == end) continue;
    const Group group = {begin - __ldg(args.offsets), end - begin, count};
    double total[kNeurons] = {};
    for (int matrix = 0; matrix < 3; ++matrix) {
      for (int64_t start = 0; start < hidden; start += kTileThreads * kPack<T>) {
        const int64_t col = start + threadIdx.x * kPack<T>;
        float sum[kNeurons][kPack<T>];
        gradient_tile<T>(args, group, neuron_index, matrix, col, aligned, staged, sum);
        if (col >= hidden) continue;
#pragma unroll
        for (int n = 0; n < kNeurons; ++n) {
          if (n >= count) continue;
          float tile = 0.0f;  // columns past the row's end add zeros
          if (args.weights) {
            const int64_t row = (expert * 3 + matrix) * width + neuron + n;
            float weight[kPack<T>];
            unpack(load_pack(static_cast<const T*>(args.weights) + row * hidden, col, hidden,
                             is_whole<T>(col, hidden, aligned)),
                   weight, T{});
#pragma unroll
            for (int i = 0; i < kPack<T>; ++i) tile += fabsf(sum[n][i] * weight[i]);
          } else {
#pragma unroll
            for (int i = 0; i < kPack<T>; ++i) tile += sum[n][i] * sum[n][i];
          }
          total[n] += static_cast<double>(tile);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kNeurons; ++n) {
#pragma unroll
      for (int lane = 16; lane > 0; lane /= 2) total[n] += __shfl_xor_sync(kFullWarp, total[n], lane);
      if (threadIdx.x % 32 == 0) part[threadIdx.x / 32][n] = total[n];
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) {
      double sum = 0.0;
#pragma unroll
      for (int warp = 0; warp < kTileWarps; ++warp) sum += part[warp][threadIdx.x];
      args.importance[expert * width + neuron + threadIdx.x] += static_cast<float>(sum);
    }
    __syncthreads();  // part is free again
  }
}

// Few additions in double: GeForce cards make one for every 32 or 64 in fp32.
template <class T>
__device__ __forceinline__ double sum_of_squares(const float (&value)[kPack<T>]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) largest = max(largest, magnitude_bits(value[i]));
  double sum = 0.0;
  if (two_float_holds_squares(largest)) {
    TwoFloat part = {};
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) add_square<sizeof(T) == 2>(part, value[i]);
    sum = static_cast<double>(part.high) + static_cast<double>(part.low);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) sum += static_cast<double>(value[i]) * static_cast<double>(value[i]);
  }
  return sum;
}

// A warp a row.
template <class T>
__global__ void __launch_bounds__(kTileThreads) squares_kernel(SquaresOfRowsArgs args, bool aligned) {
  const int64_t row = int64_t{blockIdx.x} * kTileWarps + threadIdx.x / 32;
  if (row >= args.num_rows) return;
  const T* from = static_cast<const T*>(args.rows) + row * args.cols;
  double sum = 0.0;
  for (int64_t start = threadIdx.x % 32 * kPack<T>; start < args.cols; start += kInFlight * 32 * kPack<T>) {
    uint4 pack[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t col = start + j * 32 * kPack<T>;
      pack[j] = load_pack(from, col, args.cols, is_whole<T>(col, args.cols, aligned));  // zeros past the row's end
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      float value[kPack<T>];
      unpack(pack[j], value, T{});
      sum += sum_of_squares<T>(value);
    }
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lane);
  if (threadIdx.x % 32 == 0) args.squares[row] = sum;
}

template <class Args>
bool operands_aligned(const Args& args, int64_t row_bytes) {
  return aligned(args.x, row_bytes) && aligned(args.grad_out, row_bytes);
}

}  // namespace

void row_gradient(const RowGradientArgs& args, void* stream) {
  if (args.num_neurons == 0 || args.num_experts == 0 || args.hidden_size == 0) return;
  if (args.grad_dtype == DType::f16) throw std::invalid_argument("grad: expected float32 or bfloat16");
  with_type(args.dtype, [&]<class T>(T) {
    const auto with_grad = [&]<class G>(G) {
      const int64_t row_bytes = args.hidden_size * int64_t{sizeof(T)};
      const int64_t stretches = (row_bytes + 16 * kTileThreads - 1) / (16 * kTileThreads);
      const int64_t per_expert = (args.num_neurons - 1) / (args.num_experts * kNeurons) + 1;
      const dim3 grid(static_cast<unsigned>(3 * stretches),
                      static_cast<unsigned>(std::min(args.num_experts, kMaxGridY)),
                      static_cast<unsigned>(std::min<int64_t>(per_expert, kMaxGroups)));
      launch("row_gradient", row_gradient_kernel<T, G>, grid, dim3(kTileThreads), stream, args,
             operands_aligned(args, row_bytes), aligned(args.grad, args.hidden_size * int64_t{sizeof(G)}));
    };
    args.grad_dtype == DType::f32 ? with_grad(float{}) : with_grad(Bf16{});
  });
}

void row_importance(const RowImportanceArgs& args, void* stream) {
  if (args.num_experts == 0 || args.intermediate_size == 0) return;
  with_type(args.dtype, [&]<class T>(T) {
    const int64_t row_bytes = args.hidden_size * int64_t{sizeof(T)};
    const dim3 grid(static_cast<unsigned>((args.intermediate_size + kNeurons - 1) / kNeurons),
                    static_cast<unsigned>(std::min(args.num_experts, kMaxGridY)));
    launch("row_importance", row_importance_kernel<T>, grid, dim3(kTileThreads), stream, args,
           operands_aligned(args, row_bytes) && (!args.weights || aligned(args.weights, row_bytes)));
  });
}

void squares_of_rows(const SquaresOfRowsArgs& args, void* stream) {
  if (args.num_rows == 0) return;
  with_type(args.dtype, [&]<class T>(T) {
    const dim3 grid(static_cast<unsigned>((args.num_rows + kTileWarps - 1) / kTileWarps));
    launch("squares_of_rows", squares_kernel<T>, grid, dim3(kTileThreads), stream, args,
           aligned(args.rows, args.cols * int64_t{sizeof(T)}));
  });
}

}  // namespace usaf::gpu

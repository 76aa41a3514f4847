// Gradients of single neurons on AMD GPUs, their importance, and the rows' sums of squares.
//
// A neuron's gradient is three rows of length hidden, each a dot product over its expert's tokens at every column.
// Written for RDNA2 (wave32, no matrix units), right on any wave size. A workgroup takes four neurons of one expert and
// a stretch of columns, 16 bytes a lane: few enough sums (32) that many waves stay resident to hide memory; the rows
// that other groups of four read again come from the Infinity Cache. 64 tokens' coefficients are staged in the LDS,
// four of a token in one 16-byte broadcast read. One launch covers all experts: which neurons are an expert's is a
// binary search over scalar loads, the token offsets are read on the device. Sums run over the tokens in ascending
// order, from zero, in fp32; then they are added to the result and rounded once. The importance adds squares or
// magnitudes over a lane's columns in fp32, then columns, lanes and groups of 32 lanes in double, in an order that the
// sizes alone decide. Work: 2 * 3 * hidden flops a (token, neuron); bytes: the rows of x and grad_out once a group of
// four neurons.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "kernel_api.h"
#include "launch.h"
#include "pack.h"

namespace usaf::gpu {
namespace {

constexpr int kTileThreads = 128;
constexpr int kGroup = 32;  // lanes of a wave's smallest size
constexpr int kGroups = kTileThreads / kGroup;
constexpr int kNeurons = 4;
constexpr int kTokens = 64;     // whose coefficients are staged together
constexpr int kInFlight = 2;    // tokens whose packs are on their way
constexpr int kMaxShares = 16;  // of an expert's neurons, in different workgroups

struct alignas(16) Coefficients {
  float of[kNeurons];
};

// One matrix of one expert: its rows, and the columns of coefficients.
template <class T>
struct Product {
  const T *rows, *from;
  int64_t stride, hidden_size, num_tokens;
};

// Matrix 0 is gate, 1 up, 2 down. Rows of the operands start at the expert's first token.
template <class T>
__device__ __forceinline__ Product<T> product_of(const T* __restrict__ x, const T* __restrict__ grad_out,
                                                 const T* __restrict__ grad_gate_up, const T* __restrict__ weighted_h,
                                                 int matrix, int64_t first_token, int64_t num_tokens,
                                                 int64_t hidden_size, int64_t width) {
  const int64_t stride = matrix == 2 ? width : 2 * width;
  const T* from = matrix == 2 ? weighted_h : grad_gate_up + matrix * width;
  return {(matrix == 2 ? grad_out : x) + first_token * hidden_size, from + first_token * stride, stride, hidden_size,
          num_tokens};
}

// sum[n][i] = the gradient at column col + i of the neuron whose coefficients this lane would stage as its n-th: lane l
// stages neuron l % kNeurons, which is `mine`, or none if negative. The whole workgroup comes here together.
template <bool kWide, class T>
__device__ __forceinline__ void gradient_tile(const Product<T>& product, int64_t mine, int64_t col,
                                              Coefficients (&staged)[kTokens],
                                              float (&sum)[kNeurons][Layout<T>::kPack]) {
  constexpr int kPack = Layout<T>::kPack;
#pragma unroll
  for (int n = 0; n < kNeurons; ++n) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum[n][i] = 0.0f;
  }
  for (int64_t tile = 0; tile < product.num_tokens; tile += kTokens) {
    __syncthreads();  // the last tile is used up
    for (int t = static_cast<int>(threadIdx.x) / kNeurons; t < kTokens; t += kTileThreads / kNeurons) {
      float value = 0.0f;
      if (mine >= 0 && tile + t < product.num_tokens)
        value = to_float(product.from[(tile + t) * product.stride + mine]);
      staged[t].of[threadIdx.x % kNeurons] = value;
    }
    __syncthreads();
    if (col >= product.hidden_size) continue;
    const int count = static_cast<int>(product.num_tokens - tile < kTokens ? product.num_tokens - tile : kTokens);
    for (int first = 0; first < count; first += kInFlight) {
      Pack pack[kInFlight] = {};
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j >= count) continue;
        pack[j] =
            load_weights<kWide>(product.rows + (tile + first + j) * product.hidden_size, col, product.hidden_size);
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j >= count) continue;
        const Coefficients coefficients = staged[first + j];
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          const float value = weight_of<T>(pack[j], i);
#pragma unroll
          for (int n = 0; n < kNeurons; ++n) sum[n][i] += coefficients.of[n] * value;
        }
      }
    }
  }
}

// How many of the ascending values are below `bound`, given that `low` are. Uniform over the workgroup: scalar work.
__device__ __forceinline__ int64_t count_below(const int32_t* __restrict__ values, int64_t low, int64_t count,
                                               int64_t bound) {
  while (low < count) {
    const int64_t middle = (low + count) / 2;
    if (values[middle] < bound) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// row[col + i] += sum[i], rounded once.
template <bool kWide, class T, class G>
__device__ __forceinline__ void add_columns(G* row, int64_t col, int64_t cols, const float (&sum)[Layout<T>::kPack]) {
  constexpr int kFrom = Layout<T>::kPack, kTo = Layout<G>::kPack;
  if constexpr (kFrom % kTo == 0) {
#pragma unroll
    for (int part = 0; part < kFrom; part += kTo) {
      const Pack old = load_weights<kWide>(row, col + part, cols);
      float value[kTo];
#pragma unroll
      for (int i = 0; i < kTo; ++i) value[i] = weight_of<G>(old, i) + sum[part + i];
      Pack pack;
#pragma unroll
      for (int i = 0; i < 4; ++i) pack.word[i] = packed_word<G>(value, i);
      store_weights<kWide>(row, col + part, cols, pack);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kFrom; ++i) {
      if (col + i < cols) row[col + i] = from_float<G>(to_float(row[col + i]) + sum[i]);
    }
  }
}

// blockIdx.x: a stretch of columns of one of the three matrices; y: an expert; z: a share of its neurons.
template <bool kWide, class T, class G>
__global__ void __launch_bounds__(kTileThreads)
    row_gradient_kernel(const T* __restrict__ x, const T* __restrict__ grad_out, const T* __restrict__ grad_gate_up,
                        const T* __restrict__ weighted_h, const int32_t* __restrict__ offsets,
                        const int32_t* __restrict__ neuron_expert, const int32_t* __restrict__ neuron_index,
                        G* __restrict__ grad, int64_t num_neurons, int64_t first_expert, int64_t num_experts,
                        int64_t hidden_size, int64_t width) {
  __shared__ Coefficients staged[kTokens];
  const int matrix = static_cast<int>(blockIdx.x % 3);
  const int64_t col = (int64_t{blockIdx.x / 3} * kTileThreads + threadIdx.x) * Layout<T>::kPack;
  for (int64_t expert = blockIdx.y; expert < num_experts; expert += gridDim.y) {
    const int64_t begin = offsets[expert], end = offsets[expert + 1];
    if (begin == end) continue;
    const Product<T> product =
        product_of(x, grad_out, grad_gate_up, weighted_h, matrix, begin - offsets[0], end - begin, hidden_size, width);
    const int64_t first = count_below(neuron_expert, 0, num_neurons, first_expert + expert);
    const int64_t last = count_below(neuron_expert, first, num_neurons, first_expert + expert + 1);
    for (int64_t neuron = first + blockIdx.z * kNeurons; neuron < last; neuron += int64_t{gridDim.z} * kNeurons) {
      const int64_t staged_neuron = neuron + threadIdx.x % kNeurons;
      const int64_t mine = staged_neuron < last ? neuron_index[staged_neuron] : -1;
      float sum[kNeurons][Layout<T>::kPack];
      gradient_tile<kWide, T>(product, mine, col, staged, sum);
      if (col >= hidden_size) continue;
#pragma unroll
      for (int n = 0; n < kNeurons; ++n) {
        if (neuron + n >= last) continue;
        add_columns<kWide, T>(grad + ((neuron + n) * 3 + matrix) * hidden_size, col, hidden_size, sum[n]);
      }
    }
  }
}

// blockIdx.x: four neurons; y: an expert.
template <bool kWide, class T>
__global__ void __launch_bounds__(kTileThreads)
    row_importance_kernel(const T* __restrict__ x, const T* __restrict__ grad_out, const T* __restrict__ grad_gate_up,
                          const T* __restrict__ weighted_h, const int32_t* __restrict__ offsets,
                          const T* __restrict__ weights, float* __restrict__ importance, int64_t num_experts,
                          int64_t hidden_size, int64_t width) {
  constexpr int kPack = Layout<T>::kPack;
  __shared__ Coefficients staged[kTokens];
  __shared__ double part[kGroups][kNeurons];
  const int64_t neuron = int64_t{blockIdx.x} * kNeurons;
  const int64_t staged_neuron = neuron + threadIdx.x % kNeurons;
  const int64_t mine = staged_neuron < width ? staged_neuron : -1;
  for (int64_t expert = blockIdx.y; expert < num_experts; expert += gridDim.y) {
    const int64_t begin = offsets[expert], end = offsets[expert + 1];
    if (begin == end) continue;
    double total[kNeurons] = {};
    for (int matrix = 0; matrix < 3; ++matrix) {
      const Product<T> product = product_of(x, grad_out, grad_gate_up, weighted_h, matrix, begin - offsets[0],
                                            end - begin, hidden_size, width);
      for (int64_t start = 0; start < hidden_size; start += kTileThreads * kPack) {
        const int64_t col = start + threadIdx.x * kPack;
        float sum[kNeurons][kPack];
        gradient_tile<kWide, T>(product, mine, col, staged, sum);
        if (col >= hidden_size) continue;
#pragma unroll
        for (int n = 0; n < kNeurons; ++n) {
          if (neuron + n >= width) continue;
          float tile = 0.0f;  // columns past the row's end add zeros
          if (weights) {
            const T* row = weights + ((expert * 3 + matrix) * width + neuron + n) * hidden_size;
            const Pack weight = load_weights<kWide>(row, col, hidden_size);
#pragma unroll
            for (int i = 0; i < kPack; ++i) tile += fabsf(sum[n][i] * weight_of<T>(weight, i));
          } else {
#pragma unroll
            for (int i = 0; i < kPack; ++i) tile += sum[n][i] * sum[n][i];
          }
          total[n] += static_cast<double>(tile);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kNeurons; ++n) {
#pragma unroll
      for (int lane = kGroup / 2; lane > 0; lane /= 2) total[n] += __shfl_xor(total[n], lane, kGroup);
      if (threadIdx.x % kGroup == 0) part[threadIdx.x / kGroup][n] = total[n];
    }
    __syncthreads();
    if (threadIdx.x < kNeurons && mine >= 0) {
      double sum = 0.0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) sum += part[g][threadIdx.x];
      importance[expert * width + mine] += static_cast<float>(sum);
    }
    __syncthreads();  // part is free again
  }
}

// A workgroup lies along a row.
template <bool kWide, class T>
__global__ void __launch_bounds__(kMaxThreads)
    squares_kernel(const T* __restrict__ rows, double* __restrict__ squares, int64_t num_rows, int64_t cols) {
  constexpr int kPack = Layout<T>::kPack;
  __shared__ double part[kMaxThreads / kGroup];
  for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
    double sum = 0.0;
    for (int64_t col = threadIdx.x * kPack; col < cols; col += blockDim.x * kPack) {
      const Pack pack = load_weights<kWide>(rows + row * cols, col, cols);  // zeros past the row's end
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const double value = static_cast<double>(weight_of<T>(pack, i));
        sum = fma(value, value, sum);  // the square is exact, so this rounds as often as sum + value * value
      }
    }
#pragma unroll
    for (int lane = kGroup / 2; lane > 0; lane /= 2) sum += __shfl_xor(sum, lane, kGroup);
    if (threadIdx.x % kGroup == 0) part[threadIdx.x / kGroup] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = 0.0;
      for (unsigned g = 0; g < blockDim.x / kGroup; ++g) total += part[g];
      squares[row] = total;
    }
    __syncthreads();  // part is free again
  }
}

template <class Args>
bool operands_aligned(const Args& a, int64_t row_bytes) {
  return aligned(a.x, row_bytes) && aligned(a.grad_out, row_bytes);
}

}  // namespace

void row_gradient(const RowGradientArgs& a, void* stream) {
  if (a.num_neurons == 0 || a.num_experts == 0 || a.hidden_size == 0) return;
  if (a.grad_dtype == DType::f16) throw std::invalid_argument("grad: expected float32 or bfloat16");
  with_type(a.dtype, [&]<class T>(T) {
    const auto with_grad = [&]<class G>(G) {
      const int64_t row_bytes = a.hidden_size * int64_t{sizeof(T)};
      const int64_t stretches = (row_bytes + 16 * kTileThreads - 1) / (16 * kTileThreads);
      const int64_t per_expert = (a.num_neurons - 1) / (a.num_experts * kNeurons) + 1;
      const dim3 grid(static_cast<unsigned>(3 * stretches), static_cast<unsigned>(std::min(a.num_experts, kMaxGridY)),
                      static_cast<unsigned>(std::min<int64_t>(per_expert, kMaxShares)));
      const bool wide = operands_aligned(a, row_bytes) && aligned(a.grad, a.hidden_size * int64_t{sizeof(G)});
      with_wide(wide, [&]<bool kWide>() {
        launch("row_gradient", row_gradient_kernel<kWide, T, G>, grid, dim3(kTileThreads), stream,
               static_cast<const T*>(a.x), static_cast<const T*>(a.grad_out), static_cast<const T*>(a.grad_gate_up),
               static_cast<const T*>(a.weighted_h), a.offsets, a.neuron_expert, a.neuron_index, static_cast<G*>(a.grad),
               a.num_neurons, a.first_expert, a.num_experts, a.hidden_size, a.intermediate_size);
      });
    };
    a.grad_dtype == DType::f32 ? with_grad(float{}) : with_grad(Bf16{});
  });
}

void row_importance(const RowImportanceArgs& a, void* stream) {
  if (a.num_experts == 0 || a.intermediate_size == 0) return;
  with_type(a.dtype, [&]<class T>(T) {
    const int64_t row_bytes = a.hidden_size * int64_t{sizeof(T)};
    const dim3 grid(static_cast<unsigned>((a.intermediate_size + kNeurons - 1) / kNeurons),
                    static_cast<unsigned>(std::min(a.num_experts, kMaxGridY)));
    const bool wide = operands_aligned(a, row_bytes) && (!a.weights || aligned(a.weights, row_bytes));
    with_wide(wide, [&]<bool kWide>() {
      launch("row_importance", row_importance_kernel<kWide, T>, grid, dim3(kTileThreads), stream,
             static_cast<const T*>(a.x), static_cast<const T*>(a.grad_out), static_cast<const T*>(a.grad_gate_up),
             static_cast<const T*>(a.weighted_h), a.offsets, static_cast<const T*>(a.weights), a.importance,
             a.num_experts, a.hidden_size, a.intermediate_size);
    });
  });
}

void squares_of_rows(const SquaresOfRowsArgs& a, void* stream) {
  if (a.num_rows == 0) return;
  with_type(a.dtype, [&]<class T>(T) {
    const int64_t row_bytes = a.cols * int64_t{sizeof(T)};
    with_wide(aligned(a.rows, row_bytes), [&]<bool kWide>() {
      launch("squares_of_rows", squares_kernel<kWide, T>, dim3(static_cast<unsigned>(std::min(a.num_rows, kMaxGridX))),
             dim3(static_cast<unsigned>(threads_along((row_bytes + 15) / 16))), stream, static_cast<const T*>(a.rows),
             a.squares, a.num_rows, a.cols);
    });
  });
}

}  // namespace usaf::gpu

// Rows of tokens to experts and back on AMD GPUs: gather, and the weighted combine with its adjoint.
//
// Written for RDNA2 (wave32), right on any wave size. A workgroup lies along one row; which tokens, slots and rows is
// uniform over it, so the maps are read by scalar loads and only rows pass through the vector unit, 16 bytes a lane,
// four rows in flight. Sums run over the slots of a token in ascending order, in fp32; the gradient of a weight is
// summed by lane, group of 32 lanes and workgroup in an order that the row's length alone decides. Each sum has one
// owner: float atomics are a loop on RDNA2, and none are needed. Bytes are those of the rows read and written; what is
// read top_k times comes from the Infinity Cache.
#include <algorithm>

#include "kernel_api.h"
#include "launch.h"
#include "pack.h"

namespace usaf::gpu {
namespace {

constexpr int kRows = 4;          // rows, or slots of a token, whose loads are started together
constexpr int kRowsToZero = 16;   // that a workgroup looks at
constexpr int kMapThreads = 256;  // of the kernels over maps
constexpr int kGroup = 32;        // lanes of a wave's smallest size

__device__ __forceinline__ int64_t column(int pack) { return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * pack; }

// Tokens of pairs. Both are below 2^31.
__device__ __forceinline__ int64_t token_of(int32_t pair, int64_t top_k) {
  return static_cast<uint32_t>(pair) / static_cast<uint32_t>(top_k);
}

template <bool kWide, class T>
__global__ void __launch_bounds__(kMaxThreads)
    gather_kernel(const T* __restrict__ x, const int32_t* __restrict__ source, T* __restrict__ out, int64_t num_rows,
                  int64_t hidden_size, int64_t top_k) {
  const int64_t col = column(Layout<T>::kPack);
  if (col >= hidden_size) return;
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_rows; first += int64_t{gridDim.y} * kRows) {
    int32_t pair[kRows];
    Pack pack[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) pair[r] = source[row_or_last(first + r, num_rows)];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T* from = x + token_of(pair[r] > 0 ? pair[r] : 0, top_k) * hidden_size;
      if (pair[r] < 0) from = out + first * hidden_size;  // a row that is there, and unused
      pack[r] = load_weights<kWide>(from, col, hidden_size);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= num_rows) continue;
      store_weights<kWide>(out + (first + r) * hidden_size, col, hidden_size, pair[r] >= 0 ? pack[r] : Pack{});
    }
  }
}

// Rows of out without a pair become zeros: a workgroup looks at every source of its share, four at a time.
template <bool kWide, class T>
__global__ void __launch_bounds__(kMaxThreads)
    permute_kernel(const T* __restrict__ x, const int32_t* __restrict__ source, const int32_t* __restrict__ inverse,
                   T* __restrict__ out, int64_t num_rows, int64_t num_tokens, int64_t hidden_size, int64_t top_k) {
  const int64_t col = column(Layout<T>::kPack);
  if (col >= hidden_size) return;
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_tokens; first += int64_t{gridDim.y} * kRows) {
    Pack pack[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      pack[r] = load_weights<kWide>(x + row_or_last(first + r, num_tokens) * hidden_size, col, hidden_size);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= num_tokens) continue;
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t row = inverse[(first + r) * top_k + k];
        if (row >= 0) store_weights<kWide>(out + row * hidden_size, col, hidden_size, pack[r]);
      }
    }
  }
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_rows; first += int64_t{gridDim.y} * kRows) {
    int32_t pair[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) pair[r] = source[row_or_last(first + r, num_rows)];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= num_rows || pair[r] >= 0) continue;
      store_weights<kWide>(out + (first + r) * hidden_size, col, hidden_size, Pack{});
    }
  }
}

// Rows without a pair become zeros.
template <bool kWide, class T>
__global__ void __launch_bounds__(kMaxThreads)
    zero_rows_kernel(const int32_t* __restrict__ source, T* __restrict__ out, int64_t num_rows, int64_t cols) {
  const int64_t first = int64_t{blockIdx.x} * kRowsToZero;
  const int64_t last = first + kRowsToZero < num_rows ? first + kRowsToZero : num_rows;
  for (int64_t row = first; row < last; ++row) {
    if (source[row] >= 0) continue;
    for (int64_t col = threadIdx.x * Layout<T>::kPack; col < cols; col += blockDim.x * Layout<T>::kPack) {
      store_weights<kWide>(out + row * cols, col, cols, Pack{});
    }
  }
}

__global__ void __launch_bounds__(kMapThreads) no_source_kernel(int32_t* __restrict__ source, int64_t num_rows) {
  const int64_t row = int64_t{blockIdx.x} * kMapThreads + threadIdx.x;
  if (row < num_rows) source[row] = -1;
}

__global__ void __launch_bounds__(kMapThreads)
    source_kernel(const int32_t* __restrict__ inverse, int32_t* __restrict__ source, int64_t num_pairs) {
  const int64_t pair = int64_t{blockIdx.x} * kMapThreads + threadIdx.x;
  const int32_t row = pair < num_pairs ? inverse[pair] : -1;
  if (row >= 0) source[row] = static_cast<int32_t>(pair);
}

// Router weights of any type; null: ones.
struct Weights {
  void* data;
  DType dtype;

  __device__ __forceinline__ float load(int64_t index) const {
    if (data == nullptr) return 1.0f;
    if (dtype == DType::f32) return static_cast<const float*>(data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return dtype == DType::bf16 ? to_float(Bf16{bits}) : to_float(F16{bits});
  }
  __device__ __forceinline__ void store(int64_t index, float value) const {
    if (dtype == DType::f32) {
      static_cast<float*>(data)[index] = value;
    } else {
      static_cast<uint16_t*>(data)[index] = dtype == DType::bf16 ? to_bf16(value).bits : to_f16(value).bits;
    }
  }
};

template <class T>
__device__ __forceinline__ Pack packed(const float (&value)[Layout<T>::kPack]) {
  Pack pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) pack.word[i] = packed_word<T>(value, i);
  return pack;
}

template <bool kWide, class T>
__global__ void __launch_bounds__(kMaxThreads)
    combine_kernel(const T* __restrict__ permuted, const int32_t* __restrict__ inverse, Weights weights,
                   T* __restrict__ out, int64_t num_tokens, int64_t hidden_size, int64_t top_k) {
  constexpr int kPack = Layout<T>::kPack;
  const int64_t col = column(kPack);
  if (col >= hidden_size) return;
  for (int64_t token = blockIdx.y; token < num_tokens; token += gridDim.y) {
    float sum[kPack] = {};
    for (int64_t slot = 0; slot < top_k; slot += kRows) {
      int32_t row[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int32_t there = inverse[token * top_k + row_or_last(slot + r, top_k)];
        row[r] = slot + r < top_k ? there : -1;
      }
      Pack pack[kRows] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row[r] >= 0) pack[r] = load_weights<kWide>(permuted + row[r] * hidden_size, col, hidden_size);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row[r] < 0) continue;
        const float weight = weights.load(token * top_k + slot + r);
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[i] += weight * weight_of<T>(pack[r], i);
      }
    }
    store_weights<kWide>(out + token * hidden_size, col, hidden_size, packed<T>(sum));
  }
}

// A workgroup takes a token, and four of its slots at a time.
template <bool kWide, class T>
__global__ void __launch_bounds__(kMaxThreads)
    combine_backward_kernel(const T* __restrict__ grad_out, const T* __restrict__ permuted,
                            const int32_t* __restrict__ inverse, Weights weights, T* __restrict__ grad_permuted,
                            Weights grad_weights, int64_t num_tokens, int64_t hidden_size, int64_t top_k) {
  constexpr int kPack = Layout<T>::kPack;
  __shared__ float part[kMaxThreads / kGroup][kRows];
  const int groups = static_cast<int>(blockDim.x) / kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  for (int64_t token = blockIdx.x; token < num_tokens; token += gridDim.x) {
    for (int64_t slot = 0; slot < top_k; slot += kRows) {
      int32_t row[kRows];
      float weight[kRows], dot[kRows] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t pair = token * top_k + row_or_last(slot + r, top_k);
        const int32_t there = inverse[pair];
        row[r] = slot + r < top_k ? there : -1;
        weight[r] = weights.load(pair);
      }
      for (int64_t col = threadIdx.x * kPack; col < hidden_size; col += blockDim.x * kPack) {
        const Pack grad = load_weights<kWide>(grad_out + token * hidden_size, col, hidden_size);
        Pack pack[kRows] = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (row[r] >= 0) pack[r] = load_weights<kWide>(permuted + row[r] * hidden_size, col, hidden_size);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (row[r] < 0) continue;
          float scaled[kPack];
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            dot[r] += weight_of<T>(grad, i) * weight_of<T>(pack[r], i);
            scaled[i] = weight[r] * weight_of<T>(grad, i);
          }
          store_weights<kWide>(grad_permuted + row[r] * hidden_size, col, hidden_size, packed<T>(scaled));
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int lane = kGroup / 2; lane > 0; lane /= 2) dot[r] += __shfl_xor(dot[r], lane, kGroup);
        if (threadIdx.x % kGroup == 0) part[group][r] = dot[r];
      }
      __syncthreads();
      if (threadIdx.x < kRows && slot + threadIdx.x < top_k) {
        float sum = 0.0f;
        for (int g = 0; g < groups; ++g) sum += part[g][threadIdx.x];
        grad_weights.store(token * top_k + slot + threadIdx.x, sum);
      }
      __syncthreads();  // part is free again
    }
  }
}

// The first of the call's rows after `after` that the token owns, or num_rows. `slots`: the token's of inverse.
__device__ __forceinline__ int64_t next_row(const int32_t* __restrict__ slots, int64_t top_k, int64_t first_row,
                                            int64_t num_rows, int64_t after) {
  int64_t next = num_rows;
  for (int64_t k = 0; k < top_k; ++k) {
    const int64_t row = slots[k] - first_row;
    next = row > after && row < next ? row : next;
  }
  return next;
}

// A token's first row of the call adds all of its rows, ascending, so that each sum has one owner.
template <bool kWide, class T>
__global__ void __launch_bounds__(kMaxThreads)
    scatter_add_kernel(const T* __restrict__ rows, const int32_t* __restrict__ source,
                       const int32_t* __restrict__ inverse, Weights weights, float* __restrict__ out, int64_t num_rows,
                       int64_t first_row, int64_t hidden_size, int64_t top_k) {
  constexpr int kPack = Layout<T>::kPack;
  const int64_t col = column(kPack);
  if (col >= hidden_size) return;
  for (int64_t first = blockIdx.y; first < num_rows; first += gridDim.y) {
    const int64_t token = token_of(source[first], top_k);
    const int32_t* slots = inverse + token * top_k;
    if (inverse && next_row(slots, top_k, first_row, num_rows, -1) != first) continue;
    float* to = out + token * hidden_size;
    Pack sum[kPack / 4];
#pragma unroll
    for (int part = 0; part < kPack / 4; ++part) {
      sum[part] = load_weights<kWide>(to, col + 4 * part, hidden_size);
    }
    for (int64_t row = first; row < num_rows;
         row = inverse ? next_row(slots, top_k, first_row, num_rows, row) : num_rows) {
      const Pack pack = load_weights<kWide>(rows + row * hidden_size, col, hidden_size);
      const float weight = weights.load(source[row]);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        uint32_t& word = sum[i / 4].word[i % 4];
        word = float_bits(bits_float(word) + weight * weight_of<T>(pack, i));
      }
    }
#pragma unroll
    for (int part = 0; part < kPack / 4; ++part) {
      store_weights<kWide>(to, col + 4 * part, hidden_size, sum[part]);
    }
  }
}

unsigned workgroups_of(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

int64_t packs_of(int64_t row_bytes) { return (row_bytes + 15) / 16; }

// Rows of `cols` elements that `source` gives no pair.
template <class T>
void launch_zero_rows(const char* name, const int32_t* source, void* out, int64_t num_rows, int64_t cols,
                      void* stream) {
  if (num_rows == 0) return;
  const int64_t row_bytes = cols * int64_t{sizeof(T)};
  with_wide(aligned(out, row_bytes), [&]<bool kWide>() {
    launch(name, zero_rows_kernel<kWide, T>, dim3(workgroups_of(num_rows, kRowsToZero)),
           dim3(static_cast<unsigned>(threads_along(packs_of(row_bytes)))), stream, source, static_cast<T*>(out),
           num_rows, cols);
  });
}

Weights weights_of(const void* data, DType dtype) { return {const_cast<void*>(data), dtype}; }

}  // namespace

void gather_rows(const GatherRowsArgs& a, void* stream) {
  if (a.num_rows == 0 || a.hidden_size == 0) return;
  with_type(a.dtype, [&]<class T>(T) {
    const int64_t row_bytes = a.hidden_size * int64_t{sizeof(T)};
    const LaunchShape shape = launch_shape(kRows, a.num_rows, packs_of(row_bytes));
    with_wide(aligned(a.x, row_bytes) && aligned(a.out, row_bytes), [&]<bool kWide>() {
      launch("gather_rows", gather_kernel<kWide, T>, shape.grid, shape.block, stream, static_cast<const T*>(a.x),
             a.source, static_cast<T*>(a.out), a.num_rows, a.hidden_size, a.top_k);
    });
  });
}

void permute_rows(const PermuteRowsArgs& a, void* stream) {
  if (a.num_rows == 0 || a.hidden_size == 0) return;
  with_type(a.dtype, [&]<class T>(T) {
    const int64_t row_bytes = a.hidden_size * int64_t{sizeof(T)};
    const LaunchShape shape = launch_shape(kRows, std::max<int64_t>(a.num_tokens, 1), packs_of(row_bytes));
    with_wide(aligned(a.x, row_bytes) && aligned(a.out, row_bytes), [&]<bool kWide>() {
      launch("permute_rows", permute_kernel<kWide, T>, shape.grid, shape.block, stream, static_cast<const T*>(a.x),
             a.source, a.inverse, static_cast<T*>(a.out), a.num_rows, a.num_tokens, a.hidden_size, a.top_k);
    });
  });
}

void combine_rows(const CombineRowsArgs& a, void* stream) {
  if (a.num_tokens == 0 || a.hidden_size == 0) return;
  with_type(a.dtype, [&]<class T>(T) {
    const int64_t row_bytes = a.hidden_size * int64_t{sizeof(T)};
    const LaunchShape shape = launch_shape(1, a.num_tokens, packs_of(row_bytes));
    with_wide(aligned(a.permuted, row_bytes) && aligned(a.out, row_bytes), [&]<bool kWide>() {
      launch("combine_rows", combine_kernel<kWide, T>, shape.grid, shape.block, stream,
             static_cast<const T*>(a.permuted), a.inverse, weights_of(a.weights, a.weights_dtype),
             static_cast<T*>(a.out), a.num_tokens, a.hidden_size, a.top_k);
    });
  });
}

void combine_rows_backward(const CombineRowsBackwardArgs& a, void* stream) {
  const char* name = "combine_rows_backward";
  const int64_t num_pairs = a.num_tokens * a.top_k;
  if (a.num_rows > 0) {
    launch(name, no_source_kernel, dim3(workgroups_of(a.num_rows, kMapThreads)), dim3(kMapThreads), stream, a.source,
           a.num_rows);
  }
  if (num_pairs > 0) {
    launch(name, source_kernel, dim3(workgroups_of(num_pairs, kMapThreads)), dim3(kMapThreads), stream, a.inverse,
           a.source, num_pairs);
  }
  with_type(a.dtype, [&]<class T>(T) {
    const int64_t row_bytes = a.hidden_size * int64_t{sizeof(T)};
    launch_zero_rows<T>(name, a.source, a.grad_permuted, a.num_rows, a.hidden_size, stream);
    if (num_pairs == 0) return;
    const bool wide =
        aligned(a.grad_out, row_bytes) && aligned(a.permuted, row_bytes) && aligned(a.grad_permuted, row_bytes);
    with_wide(wide, [&]<bool kWide>() {
      launch(name, combine_backward_kernel<kWide, T>, dim3(static_cast<unsigned>(std::min(a.num_tokens, kMaxGridX))),
             dim3(static_cast<unsigned>(threads_along(packs_of(row_bytes)))), stream, static_cast<const T*>(a.grad_out),
             static_cast<const T*>(a.permuted), a.inverse, weights_of(a.weights, a.weights_dtype),
             static_cast<T*>(a.grad_permuted), weights_of(a.grad_weights, a.weights_dtype), a.num_tokens, a.hidden_size,
             a.top_k);
    });
  });
}

void scatter_add_rows(const ScatterAddRowsArgs& a, void* stream) {
  if (a.num_rows == 0 || a.hidden_size == 0) return;
  with_type(a.dtype, [&]<class T>(T) {
    const int64_t row_bytes = a.hidden_size * int64_t{sizeof(T)};
    const LaunchShape shape = launch_shape(1, a.num_rows, packs_of(row_bytes));
    with_wide(aligned(a.rows, row_bytes) && aligned(a.out, a.hidden_size * 4), [&]<bool kWide>() {
      launch("scatter_add_rows", scatter_add_kernel<kWide, T>, shape.grid, shape.block, stream,
             static_cast<const T*>(a.rows), a.source, a.inverse, weights_of(a.weights, a.weights_dtype), a.out,
             a.num_rows, a.first_row, a.hidden_size, a.top_k);
    });
  });
}

}  // namespace usaf::gpu

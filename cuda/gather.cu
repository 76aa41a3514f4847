// Rows of tokens to experts and back on NVIDIA GPUs: gather, and the weighted combine with its adjoint.
//
// A thread owns 16 bytes of a row and starts the loads of four rows before it uses the first. Sums run over the slots
// of a token in ascending order, in fp32; the gradient of a weight is summed by thread, lane and warp in an order that
// the row's length alone decides. Each sum has one owner: no atomics. All of it is bandwidth-bound: bytes are those of
// the rows read and written.
#include <algorithm>

#include "kernel_api.h"
#include "launch.h"
#include "pack.h"

namespace usaf::gpu {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // rows, or slots of a token, whose loads are started together

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }

// Tokens of pairs. Both are below 2^31.
__device__ __forceinline__ int64_t token_of(int32_t pair, int64_t top_k) {
  return static_cast<unsigned>(pair) / static_cast<unsigned>(top_k);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) gather_kernel(GatherRowsArgs args, bool aligned) {
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPack<T>;
  if (col >= args.hidden_size) return;
  const bool whole = is_whole<T>(col, args.hidden_size, aligned);
  const int64_t block_rows = int64_t{blockDim.y} * kInFlight;
  for (int64_t first = blockIdx.y * block_rows; first < args.num_rows; first += gridDim.y * block_rows) {
    uint4 pack[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t row = first + j * blockDim.y + threadIdx.y;
      const int32_t pair = row < args.num_rows ? __ldg(args.source + row) : -1;
      pack[j] = make_uint4(0, 0, 0, 0);
      if (pair < 0) continue;
      const T* from = static_cast<const T*>(args.x) + token_of(pair, args.top_k) * args.hidden_size;
      pack[j] = load_pack(from, col, args.hidden_size, whole);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t row = first + j * blockDim.y + threadIdx.y;
      if (row >= args.num_rows) continue;
      store_pack(static_cast<T*>(args.out) + row * args.hidden_size, col, args.hidden_size, whole, pack[j]);
    }
  }
}

// Rows without a pair become zeros. A thread looks at the source of every row of its share, which is little beside
// them.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) permute_kernel(PermuteRowsArgs args, bool aligned) {
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPack<T>;
  if (col >= args.hidden_size) return;
  const bool whole = is_whole<T>(col, args.hidden_size, aligned);
  const int64_t block_rows = int64_t{blockDim.y} * kInFlight;
  for (int64_t first = blockIdx.y * block_rows; first < args.num_tokens; first += gridDim.y * block_rows) {
    uint4 pack[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t token = first + j * blockDim.y + threadIdx.y;
      if (token >= args.num_tokens) continue;
      const T* from = static_cast<const T*>(args.x) + token * args.hidden_size;
      pack[j] = load_pack(from, col, args.hidden_size, whole);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t token = first + j * blockDim.y + threadIdx.y;
      if (token >= args.num_tokens) continue;
      for (int64_t k = 0; k < args.top_k; ++k) {
        const int64_t row = __ldg(args.inverse + token * args.top_k + k);
        if (row < 0) continue;
        store_pack(static_cast<T*>(args.out) + row * args.hidden_size, col, args.hidden_size, whole, pack[j]);
      }
    }
  }
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t first = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; first < args.num_rows;
       first += kInFlight * step) {
    int32_t source[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      source[j] = first + j * step < args.num_rows ? __ldg(args.source + first + j * step) : 0;
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (source[j] >= 0) continue;
      store_pack(static_cast<T*>(args.out) + (first + j * step) * args.hidden_size, col, args.hidden_size, whole,
                 make_uint4(0, 0, 0, 0));
    }
  }
}

// Rows without a pair become zeros. A warp looks at 32 rows, and fills those that need it together.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    zero_rows_kernel(const int32_t* source, T* out, int64_t num_rows, int64_t cols, bool aligned) {
  const int64_t first = (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * 32;
  const int64_t mine = first + lane_id();
  unsigned empty = __ballot_sync(kFullWarp, mine < num_rows && source[mine] < 0);
  for (; empty != 0; empty &= empty - 1) {
    T* row = out + (first + __ffs(static_cast<int>(empty)) - 1) * cols;
    for (int64_t col = lane_id() * kPack<T>; col < cols; col += 32 * kPack<T>) {
      store_pack(row, col, cols, is_whole<T>(col, cols, aligned), make_uint4(0, 0, 0, 0));
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm) no_source_kernel(int32_t* source, int64_t num_rows) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row < num_rows) source[row] = -1;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    source_kernel(const int32_t* inverse, int32_t* source, int64_t num_pairs) {
  const int64_t pair = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int32_t row = pair < num_pairs ? __ldg(inverse + pair) : -1;
  if (row >= 0) source[row] = static_cast<int32_t>(pair);
}

// A router weight's bits: a conversion next to the load would wait for it there. Null: ones.
__device__ __forceinline__ uint32_t load_weight_bits(const void* weights, DType dtype, int64_t index) {
  if (weights == nullptr) return 0;
  if (dtype == DType::f32) return __ldg(static_cast<const unsigned*>(weights) + index);
  return __ldg(static_cast<const unsigned short*>(weights) + index);
}

__device__ __forceinline__ float weight_of(uint32_t bits, const void* weights, DType dtype) {
  if (weights == nullptr) return 1.0f;
  if (dtype == DType::f32) return bits_float(bits);
  const auto half = static_cast<uint16_t>(bits);
  return dtype == DType::bf16 ? to_float(Bf16{half}) : to_float(F16{half});
}

__device__ __forceinline__ float load_weight(const void* weights, DType dtype, int64_t index) {
  return weight_of(load_weight_bits(weights, dtype, index), weights, dtype);
}

__device__ __forceinline__ void store_weight(void* weights, DType dtype, int64_t index, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(weights)[index] = value;
  } else {
    static_cast<uint16_t*>(weights)[index] = dtype == DType::bf16 ? to_bf16(value).bits : to_f16(value).bits;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) combine_kernel(CombineRowsArgs args, bool aligned) {
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPack<T>;
  if (col >= args.hidden_size) return;
  const bool whole = is_whole<T>(col, args.hidden_size, aligned);
  for (int64_t token = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; token < args.num_tokens;
       token += int64_t{gridDim.y} * blockDim.y) {
    float sum[kPack<T>] = {};
    for (int64_t slot = 0; slot < args.top_k; slot += kInFlight) {
      uint4 pack[kInFlight];
      uint32_t weight_bits[kInFlight];
      int32_t row[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int64_t pair = token * args.top_k + slot + j;
        row[j] = slot + j < args.top_k ? __ldg(args.inverse + pair) : -1;
        if (row[j] < 0) continue;
        const T* from = static_cast<const T*>(args.permuted) + row[j] * args.hidden_size;
        pack[j] = load_pack(from, col, args.hidden_size, whole);
        weight_bits[j] = load_weight_bits(args.weights, args.weights_dtype, pair);
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (row[j] < 0) continue;
        const float weight = weight_of(weight_bits[j], args.weights, args.weights_dtype);
        float value[kPack<T>];
        unpack(pack[j], value, T{});
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) sum[i] += weight * value[i];
      }
    }
    store_pack(static_cast<T*>(args.out) + token * args.hidden_size, col, args.hidden_size, whole, repack(sum, T{}));
  }
}

// A block takes a token, and four of its slots at a time.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm - 1)  // five packs in flight: 85 registers spill on sm_90
    combine_backward_kernel(CombineRowsBackwardArgs args, bool aligned) {
  __shared__ float part[kWarps][kInFlight];
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x) {
    const T* grad_out = static_cast<const T*>(args.grad_out) + token * args.hidden_size;
    for (int64_t slot = 0; slot < args.top_k; slot += kInFlight) {
      const int64_t pair = token * args.top_k + slot;
      int32_t row[kInFlight];
      float weight[kInFlight], dot[kInFlight] = {};
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        row[j] = slot + j < args.top_k ? __ldg(args.inverse + pair + j) : -1;
        weight[j] = row[j] < 0 ? 0.0f : load_weight(args.weights, args.weights_dtype, pair + j);
      }
      for (int64_t col = threadIdx.x * kPack<T>; col < args.hidden_size; col += blockDim.x * kPack<T>) {
        const bool whole = is_whole<T>(col, args.hidden_size, aligned);
        uint4 pack[kInFlight];
        const uint4 grad_pack = load_pack(grad_out, col, args.hidden_size, whole);
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (row[j] < 0) continue;
          const T* from = static_cast<const T*>(args.permuted) + row[j] * args.hidden_size;
          pack[j] = load_pack(from, col, args.hidden_size, whole);
        }
        float grad[kPack<T>], value[kPack<T>];
        unpack(grad_pack, grad, T{});
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (row[j] < 0) continue;
          unpack(pack[j], value, T{});
#pragma unroll
          for (int i = 0; i < kPack<T>; ++i) dot[j] += grad[i] * value[i];
#pragma unroll
          for (int i = 0; i < kPack<T>; ++i) value[i] = weight[j] * grad[i];
          store_pack(static_cast<T*>(args.grad_permuted) + row[j] * args.hidden_size, col, args.hidden_size, whole,
                     repack(value, T{}));
        }
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        for (int lane = 16; lane > 0; lane /= 2) dot[j] += __shfl_xor_sync(kFullWarp, dot[j], lane);
        if (lane_id() == 0) part[warp][j] = dot[j];
      }
      __syncthreads();
      if (threadIdx.x < kInFlight && slot + threadIdx.x < args.top_k) {
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w) sum += part[w][threadIdx.x];
        store_weight(args.grad_weights, args.weights_dtype, pair + threadIdx.x, sum);
      }
      __syncthreads();  // part is free again
    }
  }
}

// The first of the call's rows after `after` that the token owns, or num_rows.
__device__ __forceinline__ int64_t next_row(const ScatterAddRowsArgs& args, int64_t token, int64_t after) {
  int64_t next = args.num_rows;
  for (int64_t k = 0; k < args.top_k; ++k) {
    const int64_t row = __ldg(args.inverse + token * args.top_k + k) - args.first_row;
    if (row > after && row < next) next = row;
  }
  return next;
}

// A token's first row of the call adds all of its rows, ascending, so that each sum has one owner.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    scatter_add_kernel(ScatterAddRowsArgs args, bool aligned, bool out_aligned) {
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPack<T>;
  if (col >= args.hidden_size) return;
  const bool whole = is_whole<T>(col, args.hidden_size, aligned);
  const bool out_whole = is_whole<T>(col, args.hidden_size, out_aligned);
  for (int64_t first = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; first < args.num_rows;
       first += int64_t{gridDim.y} * blockDim.y) {
    const int64_t token = token_of(__ldg(args.source + first), args.top_k);
    if (args.inverse && next_row(args, token, -1) != first) continue;
    float* out = args.out + token * args.hidden_size;
    float sum[kPack<T>];
#pragma unroll
    for (int i = 0; i < kPack<T>; i += 4) {
      float part[4];
      unpack(load_plain_pack(out, col + i, args.hidden_size, out_whole), part, float{});
#pragma unroll
      for (int n = 0; n < 4; ++n) sum[i + n] = part[n];
    }
    for (int64_t row = first; row < args.num_rows; row = args.inverse ? next_row(args, token, row) : args.num_rows) {
      const float weight = load_weight(args.weights, args.weights_dtype, __ldg(args.source + row));
      float value[kPack<T>];
      unpack(load_pack(static_cast<const T*>(args.rows) + row * args.hidden_size, col, args.hidden_size, whole), value,
             T{});
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) sum[i] += weight * value[i];
    }
#pragma unroll
    for (int i = 0; i < kPack<T>; i += 4) {
      store_pack(out, col + i, args.hidden_size, out_whole,
                 repack({sum[i], sum[i + 1], sum[i + 2], sum[i + 3]}, float{}));
    }
  }
}

unsigned blocks_of(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// Rows of `cols` elements that `source` gives no pair.
template <class T>
void launch_zero_rows(const char* name, const int32_t* source, void* out, int64_t num_rows, int64_t cols,
                      void* stream) {
  if (num_rows == 0) return;
  launch(name, zero_rows_kernel<T>, dim3(blocks_of(num_rows, 32 * kWarps)), dim3(kThreads), stream, source,
         static_cast<T*>(out), num_rows, cols, aligned(out, cols * int64_t{sizeof(T)}));
}

}  // namespace

void gather_rows(const GatherRowsArgs& args, void* stream) {
  if (args.num_rows == 0 || args.hidden_size == 0) return;
  with_type(args.dtype, [&]<class T>(T) {
    const int64_t row_bytes = args.hidden_size * int64_t{sizeof(T)};
    const LaunchShape shape = launch_shape(kInFlight, args.num_rows, (row_bytes + 15) / 16);
    launch("gather_rows", gather_kernel<T>, shape.grid, shape.block, stream, args,
           aligned(args.x, row_bytes) && aligned(args.out, row_bytes));
  });
}

void permute_rows(const PermuteRowsArgs& args, void* stream) {
  if (args.num_rows == 0 || args.hidden_size == 0) return;
  with_type(args.dtype, [&]<class T>(T) {
    const int64_t row_bytes = args.hidden_size * int64_t{sizeof(T)};
    const LaunchShape shape = launch_shape(kInFlight, std::max<int64_t>(args.num_tokens, 1), (row_bytes + 15) / 16);
    launch("permute_rows", permute_kernel<T>, shape.grid, shape.block, stream, args,
           aligned(args.x, row_bytes) && aligned(args.out, row_bytes));
  });
}

void combine_rows(const CombineRowsArgs& args, void* stream) {
  if (args.num_tokens == 0 || args.hidden_size == 0) return;
  with_type(args.dtype, [&]<class T>(T) {
    const int64_t row_bytes = args.hidden_size * int64_t{sizeof(T)};
    const LaunchShape shape = launch_shape(1, args.num_tokens, (row_bytes + 15) / 16);
    launch("combine_rows", combine_kernel<T>, shape.grid, shape.block, stream, args,
           aligned(args.permuted, row_bytes) && aligned(args.out, row_bytes));
  });
}

void combine_rows_backward(const CombineRowsBackwardArgs& args, void* stream) {
  const char* name = "combine_rows_backward";
  const int64_t num_pairs = args.num_tokens * args.top_k;
  if (args.num_rows > 0) {
    launch(name, no_source_kernel, dim3(blocks_of(args.num_rows, kThreads)), dim3(kThreads), stream, args.source,
           args.num_rows);
  }
  if (num_pairs > 0) {
    launch(name, source_kernel, dim3(blocks_of(num_pairs, kThreads)), dim3(kThreads), stream, args.inverse, args.source,
           num_pairs);
  }
  with_type(args.dtype, [&]<class T>(T) {
    const int64_t row_bytes = args.hidden_size * int64_t{sizeof(T)};
    launch_zero_rows<T>(name, args.source, args.grad_permuted, args.num_rows, args.hidden_size, stream);
    if (num_pairs == 0) return;
    int threads = 32;
    while (threads < kThreads && threads * 16 < row_bytes) threads *= 2;
    launch(name, combine_backward_kernel<T>, dim3(static_cast<unsigned>(std::min(args.num_tokens, kMaxGridX))),
           dim3(static_cast<unsigned>(threads)), stream, args,
           aligned(args.grad_out, row_bytes) && aligned(args.permuted, row_bytes) &&
               aligned(args.grad_permuted, row_bytes));
  });
}

void scatter_add_rows(const ScatterAddRowsArgs& args, void* stream) {
  if (args.num_rows == 0 || args.hidden_size == 0) return;
  with_type(args.dtype, [&]<class T>(T) {
    const int64_t row_bytes = args.hidden_size * int64_t{sizeof(T)};
    const LaunchShape shape = launch_shape(1, args.num_rows, (row_bytes + 15) / 16);
    launch("scatter_add_rows", scatter_add_kernel<T>, shape.grid, shape.block, stream, args,
           aligned(args.rows, row_bytes), aligned(args.out, args.hidden_size * 4));
  });
}

}  // namespace usaf::gpu

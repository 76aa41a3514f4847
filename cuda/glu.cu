// Gated activation on NVIDIA GPUs, forward and backward: formulas in numerics/activation.h.
//
// A thread owns 16 bytes of h, and with them two packs of gate and up: apart in the split layout, side by side and
// taken apart in registers in the interleaved one. A block is as wide as the row, up to all threads; what is left of
// the threads goes to more rows. The router weight's gradient is summed by thread, lane and warp, in an order that the
// row's length alone decides. Bytes: 3 values of the type for each of h forward, 6 backward (3 read, 3 written).
#include <algorithm>

#include "kernel_api.h"
#include "launch.h"
#include "numerics/activation.h"
#include "pack.h"

namespace usaf::gpu {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kGluBlocksPerSm = 2;  // up to 128 registers: of 85, sm_120 spills two

// Gate and up of columns [col, col + kPack) of a row.
template <class T>
struct Gates {
  float gate[kPack<T>], up[kPack<T>];
};

// Gate and up alternating in two packs, and back.
template <int kCount>
__device__ __forceinline__ void take_apart(float (&first)[kCount], float (&second)[kCount]) {
  float gate[kCount], up[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    gate[i] = 2 * i < kCount ? first[2 * i % kCount] : second[2 * i % kCount];
    up[i] = 2 * i < kCount ? first[2 * i % kCount + 1] : second[2 * i % kCount + 1];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) first[i] = gate[i], second[i] = up[i];
}

template <int kCount>
__device__ __forceinline__ void put_together(float (&gate)[kCount], float (&up)[kCount]) {
  float first[kCount], second[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    first[i] = i % 2 == 0 ? gate[i / 2] : up[i / 2];
    second[i] = i % 2 == 0 ? gate[(kCount + i) / 2] : up[(kCount + i) / 2];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) gate[i] = first[i], up[i] = second[i];
}

// Where the two packs of gate_up stand, and where what they are cut at ends.
struct Halves {
  int64_t first, second, end_of_first, end_of_second;
};

template <class T, bool kInterleaved>
__device__ __forceinline__ Halves halves(int64_t col, int64_t width) {
  if constexpr (kInterleaved) return {2 * col, 2 * col + kPack<T>, 2 * width, 2 * width};
  return {col, width + col, width, 2 * width};
}

template <class T, bool kInterleaved>
__device__ __forceinline__ Gates<T> unpack_gates(uint4 first, uint4 second, const float* bias, int64_t col,
                                                 int64_t width) {
  Gates<T> value;
  unpack(first, value.gate, T{});
  unpack(second, value.up, T{});
  if constexpr (kInterleaved) take_apart(value.gate, value.up);
  if (bias) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (col + i >= width) continue;
      value.gate[i] += __ldg(bias + (kInterleaved ? 2 * (col + i) : col + i));
      value.up[i] += __ldg(bias + (kInterleaved ? 2 * (col + i) + 1 : width + col + i));
    }
  }
  return value;
}

template <class Act, class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, kGluBlocksPerSm) glu_kernel(GluArgs args, bool aligned) {
  constexpr int kRows = 2;  // in flight
  const int64_t width = args.intermediate_size;
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPack<T>;
  if (col >= width) return;
  const Halves at = halves<T, kInterleaved>(col, width);
  const bool whole = is_whole<T>(col, width, aligned);  // and then gate and up are too
  const int64_t block_rows = int64_t{blockDim.y} * kRows;
  for (int64_t start = blockIdx.y * block_rows; start < args.num_rows; start += gridDim.y * block_rows) {
    uint4 first[kRows], second[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t row = start + j * blockDim.y + threadIdx.y;
      if (row >= args.num_rows) continue;
      const T* gate_up = static_cast<const T*>(args.gate_up) + row * 2 * width;
      first[j] = load_pack(gate_up, at.first, at.end_of_first, whole);
      second[j] = load_pack(gate_up, at.second, at.end_of_second, whole);
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t row = start + j * blockDim.y + threadIdx.y;
      if (row >= args.num_rows) continue;
      const Gates<T> value = unpack_gates<T, kInterleaved>(first[j], second[j], args.bias, col, width);
      float h[kPack<T>];
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) h[i] = Act::apply(value.gate[i], value.up[i]).h;
      store_pack(static_cast<T*>(args.h) + row * width, col, width, whole, repack(h, T{}));
    }
  }
}

// One pack of one row; returns its part of <h, grad_h>. Outputs may be the inputs: all is read before it is written.
template <class Act, class T, bool kInterleaved>
__device__ __forceinline__ float backward_pack(const GluBackwardArgs& args, int64_t row, int64_t col, float row_weight,
                                               bool aligned) {
  const int64_t width = args.intermediate_size;
  const Halves at = halves<T, kInterleaved>(col, width);
  const bool whole = is_whole<T>(col, width, aligned);  // and then gate and up are too
  const T* gate_up = static_cast<const T*>(args.gate_up) + row * 2 * width;
  const uint4 first = load_plain_pack(gate_up, at.first, at.end_of_first, whole);
  const uint4 second = load_plain_pack(gate_up, at.second, at.end_of_second, whole);
  const uint4 grad_pack = load_plain_pack(static_cast<const T*>(args.grad_h) + row * width, col, width, whole);
  Gates<T> value = unpack_gates<T, kInterleaved>(first, second, args.bias, col, width);
  float grad[kPack<T>], dot = 0.0f;
  unpack(grad_pack, grad, T{});
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    const GatedValue gated = Act::apply(value.gate[i], value.up[i]);
    dot += col + i < width ? gated.h * grad[i] : 0.0f;
    const float scaled = grad[i] * row_weight;
    value.gate[i] = scaled * gated.d_gate;
    value.up[i] = scaled * gated.d_up;
    grad[i] = row_weight * gated.h;
  }
  if constexpr (kInterleaved) put_together(value.gate, value.up);
  T* out = static_cast<T*>(args.grad_gate_up) + row * 2 * width;
  store_pack(out, at.first, at.end_of_first, whole, repack(value.gate, T{}));
  store_pack(out, at.second, at.end_of_second, whole, repack(value.up, T{}));
  if (args.weighted_h) {
    store_pack(static_cast<T*>(args.weighted_h) + row * width, col, width, whole, repack(grad, T{}));
  }
  return dot;
}

// A warp has lanes of one row only.
template <class Act, class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, kGluBlocksPerSm) glu_backward_kernel(GluBackwardArgs args, bool aligned) {
  __shared__ float part[kWarps];
  const int warps_of_row = static_cast<int>(blockDim.x) / 32;
  const int warp = static_cast<int>(threadIdx.y) * warps_of_row + static_cast<int>(threadIdx.x) / 32;
  for (int64_t start = int64_t{blockIdx.x} * blockDim.y; start < args.num_rows;
       start += int64_t{gridDim.x} * blockDim.y) {
    const int64_t row = start + threadIdx.y;
    const bool live = row < args.num_rows;
    float dot = 0.0f;
    if (live) {
      const float row_weight = args.row_weight ? __ldg(args.row_weight + row) : 1.0f;
      for (int64_t col = threadIdx.x * kPack<T>; col < args.intermediate_size; col += blockDim.x * kPack<T>) {
        dot += backward_pack<Act, T, kInterleaved>(args, row, col, row_weight, aligned);
      }
    }
    if (args.grad_row_weight == nullptr) continue;  // for the whole grid alike
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) dot += __shfl_xor_sync(kFullWarp, dot, lane);
    if (threadIdx.x % 32 == 0) part[warp] = dot;
    __syncthreads();
    if (live && threadIdx.x == 0) {
      float sum = 0.0f;
      for (int w = 0; w < warps_of_row; ++w) sum += part[warp + w];
      args.grad_row_weight[row] = sum;
    }
    __syncthreads();  // part is free again
  }
}

// body.operator()<Act, T, kInterleaved>().
template <class Body>
void with_types(Activation activation, DType dtype, bool interleaved, const Body& body) {
  with_type(dtype, [&]<class T>(T) {
    const auto with_layout = [&]<class Act>() {
      interleaved ? body.template operator()<Act, T, true>() : body.template operator()<Act, T, false>();
    };
    switch (activation) {
      case Activation::silu:
        return with_layout.template operator()<Silu>();
      case Activation::gelu_tanh:
        return with_layout.template operator()<GeluTanh>();
      case Activation::swiglu_clamped:
        return with_layout.template operator()<SwigluClamped>();
    }
  });
}

}  // namespace

void glu(const GluArgs& args, void* stream) {
  if (args.num_rows == 0 || args.intermediate_size == 0) return;
  with_types(args.activation, args.dtype, args.interleaved, [&]<class Act, class T, bool kInterleaved>() {
    const int64_t row_bytes = args.intermediate_size * int64_t{sizeof(T)};
    const LaunchShape shape = launch_shape(2, args.num_rows, (row_bytes + 15) / 16);
    launch("glu", glu_kernel<Act, T, kInterleaved>, shape.grid, shape.block, stream, args,
           aligned(args.gate_up, row_bytes) && aligned(args.h, row_bytes));
  });
}

void glu_backward(const GluBackwardArgs& args, void* stream) {
  if (args.num_rows == 0) return;
  with_types(args.activation, args.dtype, args.interleaved, [&]<class Act, class T, bool kInterleaved>() {
    const int64_t row_bytes = args.intermediate_size * int64_t{sizeof(T)};
    int width = 32;
    while (width < kThreads && width * 16 < row_bytes) width *= 2;
    const int height = kThreads / width;
    const int64_t blocks = std::min((args.num_rows + height - 1) / height, kMaxGridX);
    launch("glu_backward", glu_backward_kernel<Act, T, kInterleaved>, dim3(static_cast<unsigned>(blocks)),
           dim3(static_cast<unsigned>(width), static_cast<unsigned>(height)), stream, args,
           aligned(args.grad_h, row_bytes) && aligned(args.gate_up, row_bytes) &&
               aligned(args.grad_gate_up, row_bytes) && (!args.weighted_h || aligned(args.weighted_h, row_bytes)));
  });
}

}  // namespace usaf::gpu

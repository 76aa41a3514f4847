// Gated activation on AMD GPUs, forward and backward: formulas in numerics/activation.h.
//
// Written for RDNA2 (wave32), right on any wave size. A workgroup lies along one row, which is uniform over it, so row
// addresses and router weights are scalar work. A lane holds 16 bytes of h, and with them two packs of gate and up,
// whose values it picks from where the layout has them when it needs them: no register holds a copy. Four packs are in
// flight forward (two rows), three backward. The router weight's gradient is summed by lane, group of 32 lanes and
// workgroup, in an order that the row's length alone decides. The work is bandwidth-bound but for the sigmoid's
// division. Bytes: 3 values of the type for each of h forward, 6 backward (3 read, 3 written).
#include <algorithm>

#include "kernel_api.h"
#include "launch.h"
#include "numerics/activation.h"
#include "pack.h"

namespace usaf::gpu {
namespace {

constexpr int kRows = 2;    // of a workgroup forward, both in flight
constexpr int kGroup = 32;  // lanes of a wave's smallest size

// Two packs of a row of gate_up, as they stand there.
struct GateUp {
  Pack first, second;
};

// Where columns [col, col + kPack) of gate and up stand in a row of 2 * width, and in the bias.
template <class T, bool kInterleaved>
struct Place {
  static constexpr int kPack = Layout<T>::kPack;
  int64_t first, second, end_of_first, end_of_second;

  __device__ __forceinline__ Place(int64_t col, int64_t width)
      : first(kInterleaved ? 2 * col : col),
        second(kInterleaved ? 2 * col + kPack : width + col),
        end_of_first(kInterleaved ? 2 * width : width),
        end_of_second(2 * width) {}

  template <bool kWide>
  __device__ __forceinline__ GateUp load(const T* row) const {
    return {load_weights<kWide>(row, first, end_of_first), load_weights<kWide>(row, second, end_of_second)};
  }
  template <bool kWide>
  __device__ __forceinline__ void store(T* row, const Pack& one, const Pack& two) const {
    store_weights<kWide>(row, first, end_of_first, one);
    store_weights<kWide>(row, second, end_of_second, two);
  }

  __device__ __forceinline__ static float gate(const GateUp& packs, int i) {
    if constexpr (!kInterleaved) return weight_of<T>(packs.first, i);
    return weight_of<T>(2 * i < kPack ? packs.first : packs.second, 2 * i % kPack);
  }
  __device__ __forceinline__ static float up(const GateUp& packs, int i) {
    if constexpr (!kInterleaved) return weight_of<T>(packs.second, i);
    return weight_of<T>(2 * i < kPack ? packs.first : packs.second, 2 * i % kPack + 1);
  }
  __device__ __forceinline__ float gate_bias(const float* bias, int i) const {
    return bias[kInterleaved ? first + 2 * i : first + i];
  }
  __device__ __forceinline__ float up_bias(const float* bias, int i) const {
    return bias[kInterleaved ? first + 2 * i + 1 : second + i];
  }
};

template <class Act, class T, bool kInterleaved>
__device__ __forceinline__ GatedValue gated(const Place<T, kInterleaved>& place, const GateUp& packs,
                                            const float* __restrict__ bias, int i, bool inside) {
  float gate = place.gate(packs, i), up = place.up(packs, i);
  if (bias && inside) {
    gate += place.gate_bias(bias, i);
    up += place.up_bias(bias, i);
  }
  return Act::apply(gate, up);
}

template <class T>
__device__ __forceinline__ Pack packed(const float (&value)[Layout<T>::kPack]) {
  Pack pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) pack.word[i] = packed_word<T>(value, i);
  return pack;
}

template <bool kWide, class Act, class T, bool kInterleaved>
__global__ void __launch_bounds__(kMaxThreads) glu_kernel(const T* __restrict__ gate_up, const float* __restrict__ bias,
                                                          T* __restrict__ h, int64_t num_rows, int64_t width) {
  constexpr int kPack = Layout<T>::kPack;
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPack;
  if (col >= width) return;
  const Place<T, kInterleaved> place(col, width);
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < num_rows; first += int64_t{gridDim.y} * kRows) {
    GateUp packs[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      packs[r] = place.template load<kWide>(gate_up + row_or_last(first + r, num_rows) * 2 * width);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= num_rows) continue;
      float value[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        value[i] = gated<Act, T, kInterleaved>(place, packs[r], bias, i, kWide || col + i < width).h;
      }
      store_weights<kWide>(h + (first + r) * width, col, width, packed<T>(value));
    }
  }
}

// A workgroup takes a row. Outputs may be the inputs, so nothing here is __restrict__ but what is only read elsewhere:
// a lane reads its packs before it writes them.
template <bool kWide, class Act, class T, bool kInterleaved>
__global__ void __launch_bounds__(kMaxThreads)
    glu_backward_kernel(const T* grad_h, const T* gate_up, const float* __restrict__ bias,
                        const float* __restrict__ row_weights, T* grad_gate_up, T* weighted_h,
                        float* __restrict__ grad_row_weight, int64_t num_rows, int64_t width) {
  constexpr int kPack = Layout<T>::kPack;
  __shared__ float part[kMaxThreads / kGroup];
  for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
    const float row_weight = row_weights ? row_weights[row] : 1.0f;
    float dot = 0.0f;
    for (int64_t col = threadIdx.x * kPack; col < width; col += blockDim.x * kPack) {
      const Place<T, kInterleaved> place(col, width);
      const GateUp packs = place.template load<kWide>(gate_up + row * 2 * width);
      const Pack grad = load_weights<kWide>(grad_h + row * width, col, width);
      float one[kPack], two[kPack], weighted[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const bool inside = kWide || col + i < width;
        const GatedValue value = gated<Act, T, kInterleaved>(place, packs, bias, i, inside);
        const float grad_i = weight_of<T>(grad, i);
        dot += inside ? value.h * grad_i : 0.0f;
        const float scaled = grad_i * row_weight;
        // Into the two packs as the layout has them.
        float& to_gate = !kInterleaved ? one[i] : 2 * i < kPack ? one[2 * i % kPack] : two[2 * i % kPack];
        float& to_up = !kInterleaved ? two[i] : 2 * i < kPack ? one[2 * i % kPack + 1] : two[2 * i % kPack + 1];
        to_gate = scaled * value.d_gate;
        to_up = scaled * value.d_up;
        weighted[i] = row_weight * value.h;
      }
      place.template store<kWide>(grad_gate_up + row * 2 * width, packed<T>(one), packed<T>(two));
      if (weighted_h) store_weights<kWide>(weighted_h + row * width, col, width, packed<T>(weighted));
    }
    if (grad_row_weight == nullptr) continue;  // for the whole grid alike
#pragma unroll
    for (int lane = kGroup / 2; lane > 0; lane /= 2) dot += __shfl_xor(dot, lane, kGroup);
    if (threadIdx.x % kGroup == 0) part[threadIdx.x / kGroup] = dot;
    __syncthreads();
    if (threadIdx.x == 0) {
      float sum = 0.0f;
      for (unsigned g = 0; g < blockDim.x / kGroup; ++g) sum += part[g];
      grad_row_weight[row] = sum;
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

void glu(const GluArgs& a, void* stream) {
  if (a.num_rows == 0 || a.intermediate_size == 0) return;
  with_types(a.activation, a.dtype, a.interleaved, [&]<class Act, class T, bool kInterleaved>() {
    const int64_t row_bytes = a.intermediate_size * int64_t{sizeof(T)};
    const LaunchShape shape = launch_shape(kRows, a.num_rows, (row_bytes + 15) / 16);
    with_wide(aligned(a.gate_up, row_bytes) && aligned(a.h, row_bytes), [&]<bool kWide>() {
      launch("glu", glu_kernel<kWide, Act, T, kInterleaved>, shape.grid, shape.block, stream,
             static_cast<const T*>(a.gate_up), a.bias, static_cast<T*>(a.h), a.num_rows, a.intermediate_size);
    });
  });
}

void glu_backward(const GluBackwardArgs& a, void* stream) {
  if (a.num_rows == 0) return;
  with_types(a.activation, a.dtype, a.interleaved, [&]<class Act, class T, bool kInterleaved>() {
    const int64_t row_bytes = a.intermediate_size * int64_t{sizeof(T)};
    const bool wide = aligned(a.grad_h, row_bytes) && aligned(a.gate_up, row_bytes) &&
                      aligned(a.grad_gate_up, row_bytes) && (!a.weighted_h || aligned(a.weighted_h, row_bytes));
    with_wide(wide, [&]<bool kWide>() {
      launch("glu_backward", glu_backward_kernel<kWide, Act, T, kInterleaved>,
             dim3(static_cast<unsigned>(std::min(a.num_rows, kMaxGridX))),
             dim3(static_cast<unsigned>(threads_along((row_bytes + 15) / 16))), stream, static_cast<const T*>(a.grad_h),
             static_cast<const T*>(a.gate_up), a.bias, a.row_weight, static_cast<T*>(a.grad_gate_up),
             static_cast<T*>(a.weighted_h), a.grad_row_weight, a.num_rows, a.intermediate_size);
    });
  });
}

}  // namespace usaf::gpu

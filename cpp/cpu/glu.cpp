// Gated activation, forward and backward. A tile of a row is widened to fp32 gate and up buffers, so that one
// vectorised loop serves both layouts and all types; a row is one function, compiled for every instruction set.
#include <algorithm>

#include "../kernel_api.h"
#include "../numerics/activation.h"
#include "isa.h"
#include "parallel.h"
#include "simd.h"
#include "typed.h"

namespace usaf::cpu {
namespace {

constexpr int64_t kTile = 128;  // columns of a row handled at a time

// Elements 0, kStep, 2 * kStep, .. as floats, and back.
template <int64_t kStep, class T>
USAF_ALWAYS_INLINE void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  if constexpr (kStep == 1) {
    for (; i + kLanes <= count; i += kLanes) {
      Lanes lanes;
      load_lanes(from + i, lanes);
      store_lanes(lanes, to + i);
    }
  }
  for (; i < count; ++i) to[i] = to_float(from[i * kStep]);
}

template <int64_t kStep, class T>
USAF_ALWAYS_INLINE void narrow(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  if constexpr (kStep == 1) {
    for (; i + kLanes <= count; i += kLanes) {
      Lanes lanes;
      load_lanes(from + i, lanes);
      store_lanes(lanes, to + i);
    }
  }
  for (; i < count; ++i) to[i * kStep] = from_float<T>(from[i]);
}

// Where gate and up stand in a row of gate_up: apart (kStep 1) or interleaved (kStep 2).
template <int64_t kStep>
USAF_ALWAYS_INLINE int64_t gate_column(int64_t column) {
  return kStep * column;
}
template <int64_t kStep>
USAF_ALWAYS_INLINE int64_t up_column(int64_t column, int64_t width) {
  return kStep == 1 ? width + column : kStep * column + 1;
}

template <int64_t kStep, class T>
USAF_ALWAYS_INLINE void load_columns(const T* row, const float* bias, int64_t start, int64_t count, int64_t width,
                                     float* gate, float* up) {
  const int64_t gate_at = gate_column<kStep>(start), up_at = up_column<kStep>(start, width);
  widen<kStep>(row + gate_at, count, gate);
  widen<kStep>(row + up_at, count, up);
  if (!bias) return;
  for (int64_t i = 0; i < count; ++i) gate[i] += bias[gate_at + i * kStep];
  for (int64_t i = 0; i < count; ++i) up[i] += bias[up_at + i * kStep];
}

// Rows are short for the hardware's prefetcher, which stops at their halves: `count` elements, one row ahead.
template <class T>
USAF_ALWAYS_INLINE void fetch_next_row(const T* row, int64_t row_size, int64_t count) {
  for (int64_t i = 0; i < count; i += kLineBytes / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(row + row_size + i);
  }
}

// One row of the forward.
template <class T>
struct ForwardRow {
  const T* gate_up;
  const float* bias;
  T* h;
  int64_t width;
  bool has_next;  // another row follows

  template <class Act, int64_t kStep>
  USAF_ALWAYS_INLINE void run() const {
    alignas(64) float gate[kTile], up[kTile];
    for (int64_t start = 0; start < width; start += kTile) {
      const int64_t count = std::min(kTile, width - start);
      if (has_next) fetch_next_row(gate_up + 2 * start, 2 * width, 2 * count);
      load_columns<kStep>(gate_up, bias, start, count, width, gate, up);
      for (int64_t i = 0; i < count; ++i) gate[i] = Act::apply(gate[i], up[i]).h;
      narrow<1>(gate, count, h + start);
    }
  }
};

// One row of the backward. grad_row_weight and weighted_h may be null.
template <class T>
struct BackwardRow {
  const T *grad_h, *gate_up;
  const float* bias;
  float row_weight;
  T *grad_gate_up, *weighted_h;
  float* grad_row_weight;
  int64_t width;

  template <class Act, int64_t kStep>
  USAF_ALWAYS_INLINE void run() const {
    alignas(64) float gate[kTile], up[kTile], h[kTile], grad[kTile];
    float sum = 0.0f;
    for (int64_t start = 0; start < width; start += kTile) {
      const int64_t count = std::min(kTile, width - start);
      load_columns<kStep>(gate_up, bias, start, count, width, gate, up);
      widen<1>(grad_h + start, count, grad);
      for (int64_t i = 0; i < count; ++i) {
        const GatedValue value = Act::apply(gate[i], up[i]);
        h[i] = value.h;
        gate[i] = grad[i] * row_weight * value.d_gate;
        up[i] = grad[i] * row_weight * value.d_up;
      }
      if (grad_row_weight) sum += dot(h, grad, count);
      narrow<kStep>(gate, count, grad_gate_up + gate_column<kStep>(start));
      narrow<kStep>(up, count, grad_gate_up + up_column<kStep>(start, width));
      if (!weighted_h) continue;
      for (int64_t i = 0; i < count; ++i) h[i] = row_weight * h[i];
      narrow<1>(h, count, weighted_h + start);
    }
    if (grad_row_weight) *grad_row_weight = sum;
  }
};

template <int64_t kStep, class Row>
USAF_ALWAYS_INLINE void run_row(const Row& row, Activation activation) {
  switch (activation) {
    case Activation::silu:
      return row.template run<Silu, kStep>();
    case Activation::gelu_tanh:
      return row.template run<GeluTanh, kStep>();
    case Activation::swiglu_clamped:
      return row.template run<SwigluClamped, kStep>();
  }
}

template <class Row>
USAF_ALWAYS_INLINE void run_any(const Row& row, Activation activation, bool interleaved) {
  return interleaved ? run_row<2>(row, activation) : run_row<1>(row, activation);
}

#ifdef USAF_HAS_ISA_LEVELS
// Not USAF_CLONES: those keep to half of an AVX-512 register where the compiler vectorises.
template <class Row>
USAF_AVX2 void run_avx2(const Row& row, Activation activation, bool interleaved) {
  run_any(row, activation, interleaved);
}
template <class Row>
USAF_AVX512 void run_avx512(const Row& row, Activation activation, bool interleaved) {
  run_any(row, activation, interleaved);
}
#endif

template <class Row>
void run(const Row& row, Activation activation, bool interleaved) {
#ifdef USAF_HAS_ISA_LEVELS
  if (isa() == Isa::avx512) return run_avx512(row, activation, interleaved);
  if (isa() == Isa::avx2) return run_avx2(row, activation, interleaved);
#endif
  run_any(row, activation, interleaved);
}

}  // namespace

void glu(const GluArgs& args, void*) {
  with_type(args.dtype, [&]<class T>(T) {
    const T* gate_up = static_cast<const T*>(args.gate_up);
    T* h = static_cast<T*>(args.h);
    const int64_t width = args.intermediate_size;
    parallel_for(args.num_rows, 4 * width, [&](int64_t p) {
      run(ForwardRow<T>{gate_up + p * 2 * width, args.bias, h + p * width, width, p + 1 < args.num_rows},
          args.activation, args.interleaved);
    });
  });
}

void glu_backward(const GluBackwardArgs& args, void*) {
  with_type(args.dtype, [&]<class T>(T) {
    const T* grad_h = static_cast<const T*>(args.grad_h);
    const T* gate_up = static_cast<const T*>(args.gate_up);
    T* grad_gate_up = static_cast<T*>(args.grad_gate_up);
    T* weighted_h = static_cast<T*>(args.weighted_h);
    const int64_t width = args.intermediate_size;
    parallel_for(args.num_rows, 8 * width, [&](int64_t p) {
      run(BackwardRow<T>{grad_h + p * width, gate_up + p * 2 * width, args.bias,
                         args.row_weight ? args.row_weight[p] : 1.0f, grad_gate_up + p * 2 * width,
                         weighted_h ? weighted_h + p * width : nullptr,
                         args.grad_row_weight ? args.grad_row_weight + p : nullptr, width},
          args.activation, args.interleaved);
    });
  });
}

}  // namespace usaf::cpu

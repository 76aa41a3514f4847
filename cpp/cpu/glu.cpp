// Gated activation, forward and backward. Rows are widened to fp32 gate and up buffers, so that one vectorised loop
// serves both layouts and both types.
#include <algorithm>

#include "../kernel_api.h"
#include "../numerics/activation.h"
#include "parallel.h"
#include "simd.h"
#include "typed.h"

namespace usaf::cpu {
namespace {

constexpr int64_t kTile = 128;  // columns of a row handled at a time

struct Tile {
  float gate[kTile], up[kTile], h[kTile], d_gate[kTile], d_up[kTile];
};

template <class Act>
USAF_ALWAYS_INLINE void activate(int64_t count, Tile& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const GatedValue value = Act::apply(tile.gate[i], tile.up[i]);
    tile.h[i] = value.h;
    tile.d_gate[i] = value.d_gate;
    tile.d_up[i] = value.d_up;
  }
}

USAF_CLONES void activate_silu(int64_t count, Tile& tile) { activate<Silu>(count, tile); }
USAF_CLONES void activate_gelu_tanh(int64_t count, Tile& tile) { activate<GeluTanh>(count, tile); }
USAF_CLONES void activate_swiglu_clamped(int64_t count, Tile& tile) { activate<SwigluClamped>(count, tile); }

void activate(Activation activation, int64_t count, Tile& tile) {
  switch (activation) {
    case Activation::silu:
      return activate_silu(count, tile);
    case Activation::gelu_tanh:
      return activate_gelu_tanh(count, tile);
    case Activation::swiglu_clamped:
      return activate_swiglu_clamped(count, tile);
  }
}

// Where columns [start, start + count) of gate and up stand in a row of gate_up.
struct Columns {
  int64_t gate, up, step;
};

Columns columns(bool interleaved, int64_t intermediate_size, int64_t start) {
  return interleaved ? Columns{2 * start, 2 * start + 1, 2} : Columns{start, intermediate_size + start, 1};
}

template <class T>
USAF_ALWAYS_INLINE void load_columns(const T* row, const float* bias, const Columns& at, int64_t count, Tile& tile) {
  for (int64_t i = 0; i < count; ++i) tile.gate[i] = to_float(row[at.gate + i * at.step]);
  for (int64_t i = 0; i < count; ++i) tile.up[i] = to_float(row[at.up + i * at.step]);
  if (!bias) return;
  for (int64_t i = 0; i < count; ++i) tile.gate[i] += bias[at.gate + i * at.step];
  for (int64_t i = 0; i < count; ++i) tile.up[i] += bias[at.up + i * at.step];
}

}  // namespace

void glu(const GluArgs& args, void*) {
  with_type(args.dtype, [&]<class T>(T) {
    const T* gate_up = static_cast<const T*>(args.gate_up);
    T* h = static_cast<T*>(args.h);
    const int64_t width = args.intermediate_size;
    parallel_for(args.num_rows, 4 * width, [&](int64_t p) {
      Tile tile;
      for (int64_t start = 0; start < width; start += kTile) {
        const int64_t count = std::min(kTile, width - start);
        load_columns(gate_up + p * 2 * width, args.bias, columns(args.interleaved, width, start), count, tile);
        activate(args.activation, count, tile);
        T* out = h + p * width + start;
        for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(tile.h[i]);
      }
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
      const float row_weight = args.row_weight ? args.row_weight[p] : 1.0f;
      float grad_row_weight = 0.0f;
      Tile tile;
      float grad[kTile];
      for (int64_t start = 0; start < width; start += kTile) {
        const int64_t count = std::min(kTile, width - start);
        const Columns at = columns(args.interleaved, width, start);
        load_columns(gate_up + p * 2 * width, args.bias, at, count, tile);
        activate(args.activation, count, tile);
        for (int64_t i = 0; i < count; ++i) grad[i] = to_float(grad_h[p * width + start + i]);
        if (args.grad_row_weight) grad_row_weight += dot(tile.h, grad, count);
        T* out = grad_gate_up + p * 2 * width;
        for (int64_t i = 0; i < count; ++i) grad[i] *= row_weight;
        for (int64_t i = 0; i < count; ++i) out[at.gate + i * at.step] = from_float<T>(grad[i] * tile.d_gate[i]);
        for (int64_t i = 0; i < count; ++i) out[at.up + i * at.step] = from_float<T>(grad[i] * tile.d_up[i]);
        if (!weighted_h) continue;
        T* weighted = weighted_h + p * width + start;
        for (int64_t i = 0; i < count; ++i) weighted[i] = from_float<T>(row_weight * tile.h[i]);
      }
      if (args.grad_row_weight) args.grad_row_weight[p] = grad_row_weight;
    });
  });
}

}  // namespace usaf::cpu

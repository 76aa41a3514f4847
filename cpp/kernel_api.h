// The seam between the ops and the kernels: plain argument structs and launchers, no torch.
//
// Every backend defines the launchers of kernel_launchers.inc with the same signatures: usaf::cpu in cpp/cpu/,
// usaf::gpu in cuda/ or in hip/ (a build links exactly one of them). `stream` comes last, is a backend's native stream
// handle and is never defaulted; the CPU ignores it. All pointers are on the backend's device; rows are contiguous
// unless a stride says otherwise; GPU backends want codes at a multiple of 16 bytes. Launchers throw
// std::invalid_argument or DeviceError; zero-sized work is valid and does nothing.
#pragma once
#include <cstdint>

#include "numerics/adam.h"
#include "numerics/formats.h"

namespace usaf {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };
inline constexpr int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

enum class Activation : int32_t { silu = 0, gelu_tanh = 1, swiglu_clamped = 2 };

// Encode `num_rows` rows of `cols` weights. Row r reads weight + r * weight_stride elements and writes row
// `row_index ? row_index[r] : r` of codes/absmax (strides are code_bytes(format, cols) and num_blocks(format, cols)).
// Bytes: cols * element_size + code_bytes + scale_bytes(format) * num_blocks a row.
struct EncodeRowsArgs {
  const void* weight;        // [num_rows, cols] of weight_dtype
  uint8_t* codes;            // [.., code_bytes]
  void* absmax;              // [.., num_blocks] of scale_bytes(format) each; may be null for bf16
  const int64_t* row_index;  // [num_rows] or null
  int64_t num_rows, cols, weight_stride;
  Format format;
  DType weight_dtype;
};

// Decode `num_rows` rows: row `row_index ? row_index[r] : r` of codes/absmax goes to row `out_index ? out_index[r] : r`
// of out. The value is fp32 (numerics/block_codec.h), rounded to out_dtype.
struct DecodeRowsArgs {
  const uint8_t* codes;
  const void* absmax;
  void* out;                 // [.., cols] of out_dtype, out_stride elements a row
  const int64_t* row_index;  // [num_rows] or null
  const int64_t* out_index;  // [num_rows] or null
  int64_t num_rows, cols, out_stride;
  Format format;
  DType out_dtype;
};

// Chunks of at least 128 pairs, a multiple of a warp's, and at most 1024 of them: `counts` stays under 4 KB an expert.
inline constexpr int64_t sort_chunk_pairs(int64_t num_pairs) {
  const int64_t pairs = (num_pairs + 65535) / 65536 * 64;
  return pairs < 128 ? 128 : pairs;
}
inline constexpr int64_t num_sort_chunks(int64_t num_pairs) {
  return (num_pairs + sort_chunk_pairs(num_pairs) - 1) / sort_chunk_pairs(num_pairs);
}

// Stable counting sort of the (token, slot) pairs of index [num_tokens, top_k] by expert. index == num_experts means
// "not here": such pairs are left out. offsets[e] .. offsets[e + 1] are expert e's positions in source;
// source[p] = token * top_k + slot; inverse[token * top_k + slot] = p, or -1. source past offsets[num_experts] is -1.
// `counts` is scratch of GPU backends, where a warp counts and places the pairs of one chunk, in order.
struct SortByExpertArgs {
  const int64_t* index;  // [num_tokens, top_k], each in [0, num_experts]
  int32_t* offsets;      // [num_experts + 1]
  int32_t* source;       // [num_tokens * top_k]
  int32_t* inverse;      // [num_tokens * top_k]
  int32_t* counts;       // [num_sort_chunks(num_tokens * top_k), num_experts], or null on the CPU
  int64_t num_tokens, top_k, num_experts;
};

// out[p] = x[source[p] / top_k] for p in [0, num_rows); a row whose source is -1 becomes zeros.
struct GatherRowsArgs {
  const void* x;          // [num_tokens, hidden_size] of dtype
  const int32_t* source;  // [num_rows]
  void* out;              // [num_rows, hidden_size] of dtype
  int64_t num_rows, hidden_size, top_k;
  DType dtype;
};

// out[inverse[t, k]] = x[t] wherever inverse is not -1: the same rows, reading each token once. Rows of out that no
// pair owns become zeros.
struct PermuteRowsArgs {
  const void* x;           // [num_tokens, hidden_size] of dtype
  const int32_t* source;   // [num_rows]: -1 where no pair owns the row
  const int32_t* inverse;  // [num_tokens, top_k], each row of out at most once
  void* out;               // [num_rows, hidden_size] of dtype
  int64_t num_rows, num_tokens, top_k, hidden_size;
  DType dtype;
};

// out[t] = sum over k, ascending, of weights[t, k] * permuted[inverse[t, k]] (pairs with inverse -1 are left out),
// accumulated in fp32 and rounded once. weights null: all ones (the adjoint of gather).
struct CombineRowsArgs {
  const void* permuted;    // [num_rows, hidden_size] of dtype
  const int32_t* inverse;  // [num_tokens, top_k]
  const void* weights;     // [num_tokens, top_k] of weights_dtype, or null
  void* out;               // [num_tokens, hidden_size] of dtype
  int64_t num_tokens, top_k, hidden_size;
  DType dtype, weights_dtype;
};

// grad_weights[t, k] = <grad_out[t], permuted[inverse[t, k]]> in fp32 (0 where inverse is -1), and
// grad_permuted[inverse[t, k]] = weights[t, k] * grad_out[t]; rows of grad_permuted that no pair owns become zeros.
struct CombineRowsBackwardArgs {
  const void* grad_out;    // [num_tokens, hidden_size] of dtype
  const void* permuted;    // [num_rows, hidden_size] of dtype
  const int32_t* inverse;  // [num_tokens, top_k]
  const void* weights;     // [num_tokens, top_k] of weights_dtype
  void* grad_permuted;     // [num_rows, hidden_size] of dtype
  void* grad_weights;      // [num_tokens, top_k] of weights_dtype
  int32_t* source;         // [num_rows]: scratch of GPU backends, or null on the CPU
  int64_t num_rows, num_tokens, top_k, hidden_size;
  DType dtype, weights_dtype;
};

// out[source[p] / top_k] += weights[source[p]] * rows[p], in fp32, for p ascending. The expert layer's running combine:
// called expert by expert, in ascending order, it gives the same bits whatever the grouping. weights null: ones.
// A GPU finds the other rows of a token through `inverse`; null there promises that no token owns two of the rows (one
// expert's, say). The CPU needs none.
struct ScatterAddRowsArgs {
  const void* rows;        // [num_rows, hidden_size] of dtype
  const int32_t* source;   // [num_rows], none -1
  const int32_t* inverse;  // [num_tokens, top_k]: row p stands at first_row + p of the permuted order; or null
  const void* weights;     // [num_tokens, top_k] of weights_dtype, or null
  float* out;              // [num_tokens, hidden_size]
  int64_t num_rows, first_row, hidden_size, top_k;
  DType dtype, weights_dtype;
};

// h = act(gate) * up. gate_up [num_rows, 2 * intermediate_size]: gate columns then up columns, or (interleaved) gate
// and up alternating. bias [2 * intermediate_size] fp32 in the same order, or null, is added first.
struct GluArgs {
  const void* gate_up;
  const float* bias;
  void* h;  // [num_rows, intermediate_size] of dtype
  int64_t num_rows, intermediate_size;
  bool interleaved;
  Activation activation;
  DType dtype;
};

// Given grad_h = dL/dh before the router weight (grad_out @ W_down), per row p with router weight w:
// grad_row_weight[p] = <h, grad_h>; grad_gate_up = w * grad_h through the activation; weighted_h = w * h (for the down
// rows' gradient). row_weight null: w = 1. weighted_h and grad_row_weight may be null. grad_gate_up may be gate_up, and
// weighted_h may be grad_h.
struct GluBackwardArgs {
  const void* grad_h;       // [num_rows, intermediate_size] of dtype
  const void* gate_up;      // [num_rows, 2 * intermediate_size] of dtype
  const float* bias;        // [2 * intermediate_size] or null
  const float* row_weight;  // [num_rows] or null
  void* grad_gate_up;       // as gate_up
  void* weighted_h;         // [num_rows, intermediate_size] of dtype, or null
  float* grad_row_weight;   // [num_rows] or null
  int64_t num_rows, intermediate_size;
  bool interleaved;
  Activation activation;
  DType dtype;
};

// Gradients of the selected neurons of experts [first_expert, first_expert + num_experts), summed in fp32 and then
// added to grad, rounded once.
// Neuron i (expert neuron_expert[i], index j = neuron_index[i]) owns three rows of grad:
//   grad[i, 0] += grad_gate[tokens of the expert, j]^T x, grad[i, 1] += grad_up[.., j]^T x,
//   grad[i, 2] += weighted_h[.., j]^T grad_out.
// Rows of x, grad_out, grad_gate_up and weighted_h are in permuted order and start at expert `first_expert`; offsets
// [num_experts + 1] starts there too and offsets[0] is subtracted. neuron_expert is absolute.
struct RowGradientArgs {
  const void* x;                 // [num_rows, hidden_size] of dtype
  const void* grad_out;          // [num_rows, hidden_size] of dtype
  const void* grad_gate_up;      // [num_rows, 2 * intermediate_size] of dtype, split layout
  const void* weighted_h;        // [num_rows, intermediate_size] of dtype
  const int32_t* offsets;        // [num_experts + 1]
  const int32_t* neuron_expert;  // [num_neurons], ascending
  const int32_t* neuron_index;   // [num_neurons]
  void* grad;                    // [num_neurons, 3, hidden_size] of grad_dtype: f32 or bf16
  int64_t num_neurons, first_expert, num_experts, hidden_size, intermediate_size;
  DType dtype, grad_dtype;
};

// squares[r] = sum of squares of row r, in double.
struct SquaresOfRowsArgs {
  const void* rows;  // [num_rows, cols] of dtype
  double* squares;   // [num_rows]
  int64_t num_rows, cols;
  DType dtype;
};

// importance[e, j] += the sum, over the 3 * hidden_size weights of neuron j of expert e, of gradient^2 (weights null)
// or |gradient * weight|; the gradients are not kept. Other arguments as in RowGradientArgs.
struct RowImportanceArgs {
  const void* x;
  const void* grad_out;
  const void* grad_gate_up;
  const void* weighted_h;
  const int32_t* offsets;
  const void* weights;  // [num_experts, 3, intermediate_size, hidden_size] of dtype, or null
  float* importance;    // [num_experts, intermediate_size], starting at first_expert
  int64_t num_experts, hidden_size, intermediate_size;
  DType dtype;
};

// One Adam/AdamW step on num_rows rows, then their new codes: formulas in numerics/adam.h, numerics/residual.h and
// numerics/dynamic8.h. Row r is skipped (no bit of it changes) if active && !active[r], and all rows if found_inf &&
// *found_inf != 0.
struct MaskedAdamArgs {
  uint8_t* codes;              // [num_rows, code_bytes(format, cols)]
  void* absmax;                // [num_rows, num_blocks(format, cols)] of scale_bytes(format) each; may be null for bf16
  void* master;                // [num_rows, cols] of master_dtype (mode master), else null
  int8_t* residual;            // [num_rows, cols] (mode residual), else null
  void *exp_avg, *exp_avg_sq;  // [num_rows, cols]: fp32, or 8-bit codes where the next two are given
  float *exp_avg_absmax, *exp_avg_sq_absmax;  // [num_rows, num_moment_blocks(cols)], or null: fp32 moments
  int32_t* step;                              // [num_rows], steps done so far; incremented
  const void* grad;                           // [num_rows, cols] of grad_dtype
  const bool* active;                         // [num_rows] or null
  const float* grad_scale;                    // one element: gradients are multiplied by it; or null
  const float* found_inf;                     // one element; or null
  int32_t* changed;  // one element: set to 1 if a bit of codes, absmax, master or residual changed; or null
  int64_t num_rows, cols;
  double lr, beta1, beta2, eps, weight_decay;
  uint64_t seed;          // stochastic: rounding noise is keyed by (seed, step, first_element + element)
  int64_t first_element;  // of row 0, so that a bank cut in pieces rounds the same
  Format format;
  AdamMode mode;
  DType master_dtype, grad_dtype;  // f32 or bf16
  bool stochastic;                 // in_place and eco: stochastic rounding, else to nearest
};

// out = map[codes] * absmax of block-wise 8-bit moments (numerics/dynamic8.h).
struct DecodeMoments8Args {
  const uint8_t* codes;  // [num_rows, cols]
  const float* absmax;   // [num_rows, num_moment_blocks(cols)]
  float* out;            // [num_rows, cols]
  int64_t num_rows, cols;
  bool is_signed;  // exp_avg's map, else exp_avg_sq's
};

// Between weights and the residual beside their codes (numerics/residual.h): decode_residual writes `weight`,
// encode_residual writes `residual`.
struct ResidualArgs {
  const uint8_t* codes;  // [num_rows, code_bytes]
  const void* absmax;    // [num_rows, num_blocks] scales of the format
  int8_t* residual;      // [num_rows, cols]
  float* weight;         // [num_rows, cols]
  int64_t num_rows, cols;
  Format format;
};

// out[t, e]: uniform on (0, 1), a function of (seed, step, micro_batch, layer, t, e) alone (numerics/rng.h).
struct RouterUniformArgs {
  float* out;  // [num_tokens, num_experts], num_tokens * ceil(num_experts / 4) <= 2^32
  int64_t num_tokens, num_experts;
  uint64_t seed;
  int32_t step, micro_batch, layer;
};

namespace cpu {
#include "kernel_launchers.inc"
}
namespace gpu {
#include "kernel_launchers.inc"
}

}  // namespace usaf

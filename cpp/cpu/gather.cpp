// Tokens to experts and back: stable counting sort, gather, and the weighted combine with its adjoint. No atomics:
// every output element is summed by one thread, in a fixed order.
#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../kernel_api.h"
#include "parallel.h"
#include "simd.h"
#include "stream.h"
#include "typed.h"

namespace usaf::cpu {
namespace {

constexpr int64_t kTile = 256;  // columns of scatter_add that a thread owns

USAF_CLONES void add_scaled(const float* row, float weight, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += weight * row[i];
}
USAF_CLONES void add_scaled(const Bf16* row, float weight, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += weight * to_float(row[i]);
}
USAF_CLONES void add_scaled(const F16* row, float weight, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += weight * to_float(row[i]);
}

// Rows that are summed with weights, and as many rows of the next sum, which are asked for meanwhile.
struct WeightedRows {
  const void* const* rows;
  const float* weights;
  int64_t num_rows;
  const void* const* next;
};

constexpr int64_t kAheadBytes = 1024;  // how far before their use a row's lines are asked for

// out = sum over the rows, ascending, of weight * row, for kLines cache lines of columns; the sums stay in registers.
template <int64_t kLines, class T>
USAF_ALWAYS_INLINE void sum_lines(const WeightedRows& from, int64_t column, const void* const* soon, int64_t ahead,
                                  bool stream, T* out) {
  constexpr int64_t kWidth = kLineLanes<T> * kLanes;
  Line<T> sum[kLines] = {};
  for (int64_t k = 0; k < from.num_rows; ++k) {
    const T* row = static_cast<const T*>(from.rows[k]) + column;
    const Lanes weight = from.weights[k] - Lanes{};
    for (int64_t l = 0; l < kLines; ++l) {
      __builtin_prefetch(static_cast<const T*>(soon[k]) + ahead + l * kWidth);
      Line<T> line;
      load_line(row + l * kWidth, line);
      for (int64_t i = 0; i < kLineLanes<T>; ++i) sum[l][i] += weight * line[i];
    }
  }
  for (int64_t l = 0; l < kLines; ++l) {
    if (stream) {
      T line[kWidth];
      store_line(sum[l], line);
      stream_copy(line, kLineBytes, out + column + l * kWidth);
    } else {
      store_line(sum[l], out + column + l * kWidth);
    }
  }
}

// The same for all columns.
template <class T>
USAF_ALWAYS_INLINE void sum_rows(const WeightedRows& from, int64_t count, bool stream, T* out) {
  constexpr int64_t kWidth = kLineLanes<T> * kLanes, kAhead = kAheadBytes / static_cast<int64_t>(sizeof(T));
  int64_t column = 0;
  for (; column + 2 * kWidth <= count; column += 2 * kWidth) {
    const bool wraps = column + kAhead >= count;
    sum_lines<2>(from, column, wraps ? from.next : from.rows, column + kAhead - (wraps ? count : 0), stream, out);
  }
  for (; column + kWidth <= count; column += kWidth) sum_lines<1>(from, column, from.next, 0, stream, out);
  for (; column < count; ++column) {
    float sum = 0.0f;
    for (int64_t k = 0; k < from.num_rows; ++k) {
      sum += from.weights[k] * to_float(static_cast<const T*>(from.rows[k])[column]);
    }
    out[column] = from_float<T>(sum);
  }
}

USAF_CLONES void combine_row(const WeightedRows& from, int64_t count, bool stream, float* out) {
  sum_rows(from, count, stream, out);
}
USAF_CLONES void combine_row(const WeightedRows& from, int64_t count, bool stream, Bf16* out) {
  sum_rows(from, count, stream, out);
}
USAF_CLONES void combine_row(const WeightedRows& from, int64_t count, bool stream, F16* out) {
  sum_rows(from, count, stream, out);
}

// out = weight * grad; returns <grad, row>, in the order of dot (simd.h). The next row is asked for meanwhile.
template <class T>
USAF_ALWAYS_INLINE float dot_and_scale(const T* grad, const T* row, const T* next, float weight, int64_t count,
                                       bool stream, T* out) {
  constexpr int64_t kWidth = kLineLanes<T> * kLanes;
  Lanes sum = {};
  int64_t column = 0;
  for (; column + kWidth <= count; column += kWidth) {
    __builtin_prefetch(next + column);
    alignas(kLineBytes) T line[kWidth];
    for (int64_t i = 0; i < kWidth; i += kLanes) add_products(grad + column + i, row + column + i, sum);
    Line<T> scaled;
    load_line(grad + column, scaled);
    for (Lanes& lanes : scaled) lanes *= weight;
    store_line(scaled, line);
    if (stream) {
      stream_copy(line, kLineBytes, out + column);
    } else {
      std::memcpy(out + column, line, kLineBytes);
    }
  }
  for (int64_t i = column; i < count; ++i) out[i] = from_float<T>(weight * to_float(grad[i]));
  return end_dot(grad, row, column, count, sum);
}

USAF_CLONES float combine_backward(const float* grad, const float* row, const float* next, float weight, int64_t count,
                                   bool stream, float* out) {
  return dot_and_scale(grad, row, next, weight, count, stream, out);
}
USAF_CLONES float combine_backward(const Bf16* grad, const Bf16* row, const Bf16* next, float weight, int64_t count,
                                   bool stream, Bf16* out) {
  return dot_and_scale(grad, row, next, weight, count, stream, out);
}
USAF_CLONES float combine_backward(const F16* grad, const F16* row, const F16* next, float weight, int64_t count,
                                   bool stream, F16* out) {
  return dot_and_scale(grad, row, next, weight, count, stream, out);
}

}  // namespace

void sort_by_expert(const SortByExpertArgs& args, void*) {
  const int64_t num_pairs = args.num_tokens * args.top_k;
  if (num_pairs > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("index: more than 2^31 - 1 (token, slot) pairs in one call");
  }
  std::vector<int32_t> next(static_cast<size_t>(args.num_experts) + 1, 0);
  for (int64_t i = 0; i < num_pairs; ++i) ++next[static_cast<size_t>(args.index[i])];
  int32_t start = 0;
  for (int64_t e = 0; e <= args.num_experts; ++e) {
    const int32_t count = next[static_cast<size_t>(e)];
    args.offsets[e] = next[static_cast<size_t>(e)] = start;
    start += count;
  }
  std::fill(args.source + args.offsets[args.num_experts], args.source + num_pairs, -1);
  for (int64_t i = 0; i < num_pairs; ++i) {
    if (args.index[i] == args.num_experts) {
      args.inverse[i] = -1;
      continue;
    }
    const int32_t position = next[static_cast<size_t>(args.index[i])]++;
    args.source[position] = static_cast<int32_t>(i);
    args.inverse[i] = position;
  }
}

void gather_rows(const GatherRowsArgs& args, void*) {
  const int64_t row_bytes = args.hidden_size * element_size(args.dtype);
  const char* x = static_cast<const char*>(args.x);
  char* out = static_cast<char*>(args.out);
  parallel_for(args.num_rows, args.hidden_size, [&](int64_t p) {
    if (args.source[p] < 0) {
      std::memset(out + p * row_bytes, 0, static_cast<size_t>(row_bytes));
    } else {
      std::memcpy(out + p * row_bytes, x + args.source[p] / args.top_k * row_bytes, static_cast<size_t>(row_bytes));
    }
  });
}

void permute_rows(const PermuteRowsArgs& args, void*) {
  const int64_t row_bytes = args.hidden_size * element_size(args.dtype);
  const bool stream = may_stream(args.out, args.num_rows, row_bytes, row_bytes, 1);
  const char* x = static_cast<const char*>(args.x);
  char* out = static_cast<char*>(args.out);
  parallel_for_runs(args.num_tokens, args.hidden_size * args.top_k, [&](int64_t first, int64_t last) {
    for (int64_t pair = first * args.top_k; pair < last * args.top_k; ++pair) {
      if (args.inverse[pair] < 0) continue;
      const char* from = x + pair / args.top_k * row_bytes;
      char* to = out + args.inverse[pair] * row_bytes;
      if (stream) {
        stream_copy(from, row_bytes, to);
      } else {
        std::memcpy(to, from, static_cast<size_t>(row_bytes));
      }
    }
    if (stream) stream_fence();
  });
  parallel_for(args.num_rows, args.hidden_size, [&](int64_t p) {
    if (args.source[p] < 0) std::memset(out + p * row_bytes, 0, static_cast<size_t>(row_bytes));
  });
}

void combine_rows(const CombineRowsArgs& args, void*) {
  with_type(args.dtype, [&]<class T>(T) {
    const T* permuted = static_cast<const T*>(args.permuted);
    T* out = static_cast<T*>(args.out);
    const int64_t row_bytes = args.hidden_size * int64_t{sizeof(T)};
    const bool stream = may_stream(out, args.num_tokens, row_bytes, row_bytes, 1);
    parallel_for_runs(args.num_tokens, args.hidden_size * (args.top_k + 1), [&](int64_t first, int64_t last) {
      std::vector<const void*> rows, next, ahead;
      std::vector<float> weights, next_weights;
      const auto list = [&](int64_t t) {  // the rows of token t, into next
        next.clear();
        next_weights.clear();
        for (int64_t pair = t * args.top_k; t < args.num_tokens && pair < (t + 1) * args.top_k; ++pair) {
          if (args.inverse[pair] < 0) continue;
          next.push_back(permuted + args.inverse[pair] * args.hidden_size);
          next_weights.push_back(args.weights ? load(args.weights, args.weights_dtype, pair) : 1.0f);
        }
      };
      list(first);
      for (int64_t t = first; t < last; ++t) {
        rows.swap(next);
        weights.swap(next_weights);
        list(t + 1);
        T* to = out + t * args.hidden_size;
        ahead.assign(next.begin(), next.end());
        ahead.resize(std::max(ahead.size(), rows.size()), permuted);
        combine_row({rows.data(), weights.data(), static_cast<int64_t>(rows.size()), ahead.data()}, args.hidden_size,
                    stream, to);
      }
      if (stream) stream_fence();
    });
  });
}

void combine_rows_backward(const CombineRowsBackwardArgs& args, void*) {
  with_type(args.dtype, [&]<class T>(T) {
    const T* grad_out = static_cast<const T*>(args.grad_out);
    const T* permuted = static_cast<const T*>(args.permuted);
    T* grad_permuted = static_cast<T*>(args.grad_permuted);
    const int64_t row_bytes = args.hidden_size * int64_t{sizeof(T)};
    const bool stream = may_stream(grad_permuted, args.num_rows, row_bytes, row_bytes, 1);
    const int64_t num_pairs = args.num_tokens * args.top_k;
    std::vector<uint8_t> owned(static_cast<size_t>(args.num_rows), 0);
    parallel_for_runs(args.num_tokens, args.hidden_size * args.top_k, [&](int64_t first, int64_t last) {
      for (int64_t pair = first * args.top_k; pair < last * args.top_k; ++pair) {
        const int64_t p = args.inverse[pair];
        if (p < 0) {
          store(args.grad_weights, args.weights_dtype, pair, 0.0f);
          continue;
        }
        owned[static_cast<size_t>(p)] = 1;
        const int64_t next = pair + 1 < num_pairs && args.inverse[pair + 1] >= 0 ? args.inverse[pair + 1] : p;
        const float grad_weight =
            combine_backward(grad_out + pair / args.top_k * args.hidden_size, permuted + p * args.hidden_size,
                             permuted + next * args.hidden_size, load(args.weights, args.weights_dtype, pair),
                             args.hidden_size, stream, grad_permuted + p * args.hidden_size);
        store(args.grad_weights, args.weights_dtype, pair, grad_weight);
      }
      if (stream) stream_fence();
    });
    parallel_for(args.num_rows, args.hidden_size, [&](int64_t p) {
      if (!owned[static_cast<size_t>(p)]) std::fill_n(grad_permuted + p * args.hidden_size, args.hidden_size, T{});
    });
  });
}

void scatter_add_rows(const ScatterAddRowsArgs& args, void*) {
  const int64_t num_tiles = (args.hidden_size + kTile - 1) / kTile;
  with_type(args.dtype, [&]<class T>(T) {
    const T* rows = static_cast<const T*>(args.rows);
    // Threads share the columns, not the rows: a token may own several rows.
    parallel_for(num_tiles, kTile * args.num_rows, [&](int64_t tile) {
      const int64_t column = tile * kTile, count = std::min(kTile, args.hidden_size - column);
      for (int64_t p = 0; p < args.num_rows; ++p) {
        const int64_t pair = args.source[p];
        const float weight = args.weights ? load(args.weights, args.weights_dtype, pair) : 1.0f;
        add_scaled(rows + p * args.hidden_size + column, weight, count,
                   args.out + pair / args.top_k * args.hidden_size + column);
      }
    });
  });
}

}  // namespace usaf::cpu

// Masked Adam: read a row, step it, write its new codes, in one pass over memory. Threads share the rows; a row goes
// through in blocks that stay in the first-level cache between the loops over them. Every row function exists once for
// each format and instruction set (isa.h).
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "../kernel_api.h"
#include "adam_block.h"
#include "codec_generic.h"
#include "decode_avx512.h"
#include "encode_avx512.h"
#include "isa.h"
#include "moments8.h"
#include "parallel.h"

namespace usaf::cpu {
namespace {

// Replaces `count` bytes of `target`; true if any differs.
USAF_ALWAYS_INLINE bool replace(void* target, const void* value, int64_t count) {
  const auto bytes = static_cast<size_t>(count);
  if (std::memcmp(target, value, bytes) == 0) return false;
  std::memcpy(target, value, bytes);
  return true;
}

// The codec of one block, as plain loops.
struct PlainCodec {
  template <Format kFormat>
  USAF_ALWAYS_INLINE static void encode(const float* weight, int64_t count, const uint32_t* random, uint8_t* codes,
                                        void* absmax) {
    if constexpr (kFormat == Format::bf16) {
      auto* out = reinterpret_cast<Bf16*>(codes);
      for (int64_t i = 0; i < kBlockSize; ++i) {
        out[i] = random ? to_bf16_stochastic(weight[i], random[i]) : to_bf16(weight[i]);
      }
    } else {
      *static_cast<typename BlockCodec<kFormat>::Scale*>(absmax) =
          encode_block_generic<kFormat>(weight, count, random, codes);
    }
  }
  template <Format kFormat>
  USAF_ALWAYS_INLINE static void decode(const uint8_t* codes, const void* absmax, float* out) {
    if constexpr (kFormat == Format::bf16) {
      decode_bf16_generic(codes, kBlockSize, out);
    } else {
      decode_row_generic<kFormat>(codes, absmax, kBlockSize, out);
    }
  }
};

// What one block is stepped from and into, each of 64 elements: pad what is shorter.
struct Block {
  const void* grad;
  void* master;
  int8_t* residual;
  float *exp_avg, *exp_avg_sq;
  uint8_t* codes;
  void* absmax;
  int64_t count;          // weights; codes after theirs are not written
  int64_t first_element;  // in the noise
};

struct Step {
  const MaskedAdamArgs& args;
  AdamScalars scalars;
  int32_t step;  // counting this one
  float grad_scale;
};

// True if a bit of codes, absmax, master or residual changed.
template <class Codec, Format kFormat>
USAF_ALWAYS_INLINE bool run_block(const Step& step, const Block& block) {
  const MaskedAdamArgs& args = step.args;
  const bool has_master = args.mode == AdamMode::master, has_residual = args.mode == AdamMode::residual;
  alignas(64) float weight[kBlockSize], decoded[kBlockSize], unit[kBlockSize];
  if (!has_master) {
    Codec::template decode<kFormat>(block.codes, block.absmax, weight);
  } else if (args.master_dtype == DType::f32) {
    load_block(static_cast<const float*>(block.master), weight);
  } else {
    load_block(static_cast<const Bf16*>(block.master), weight);
  }
  if (has_residual) {
    residual_units<kFormat>(block.codes, block.absmax, unit);
    add_residual(block.residual, unit, weight);
  }

  if (args.grad_dtype == DType::f32) {
    step_block(step.scalars, step.grad_scale, static_cast<const float*>(block.grad), block.exp_avg, block.exp_avg_sq,
               weight);
  } else {
    step_block(step.scalars, step.grad_scale, static_cast<const Bf16*>(block.grad), block.exp_avg, block.exp_avg_sq,
               weight);
  }

  bool changed = false;
  if (has_master) {
    changed = args.master_dtype == DType::f32 ? store_block(weight, static_cast<float*>(block.master))
                                              : store_block(weight, static_cast<Bf16*>(block.master));
  }
  alignas(64) uint8_t codes[2 * kBlockSize];
  alignas(float) uint8_t scale[sizeof(float)];
  uint32_t random[kBlockSize];
  const bool stochastic = args.stochastic && !has_master && !has_residual;
  if (stochastic) fill_random(args.seed, step.step, block.first_element, random);
  Codec::template encode<kFormat>(weight, block.count, stochastic ? random : nullptr, codes, scale);
  changed |= replace(block.codes, codes, used_bytes(kFormat, block.count));
  if constexpr (kFormat != Format::bf16) changed |= replace(block.absmax, scale, scale_bytes(kFormat));

  if (has_residual) {
    Codec::template decode<kFormat>(codes, scale, decoded);
    residual_units<kFormat>(codes, scale, unit);
    changed |= encode_residual(weight, decoded, unit, block.residual);
  } else if (args.mode == AdamMode::eco) {
    Codec::template decode<kFormat>(codes, scale, decoded);
    carry_error(step.scalars, weight, decoded, block.exp_avg_sq, block.exp_avg);
  }
  return changed;
}

// A padded copy of the first `count` elements of `data`, written back by store().
template <class T, int64_t kSize = kBlockSize>
struct Padded {
  T values[kSize] = {};
  T* load(const void* data, int64_t count) {
    if (data) std::memcpy(values, data, static_cast<size_t>(count) * sizeof(T));
    return values;
  }
  void store(void* data, int64_t count) const {
    if (data) std::memcpy(data, values, static_cast<size_t>(count) * sizeof(T));
  }
};

// A block shorter than 64.
template <class Codec, Format kFormat>
USAF_ALWAYS_INLINE bool run_short_block(const Step& step, const Block& block) {
  const int64_t grad_bytes = block.count * element_size(step.args.grad_dtype);
  const int64_t master_bytes = block.count * element_size(step.args.master_dtype);
  const int64_t used = used_bytes(kFormat, block.count);
  Padded<uint8_t, kBlockSize * sizeof(float)> grad, master;
  Padded<uint8_t, kBlockSize * sizeof(Bf16)> codes;
  Padded<int8_t> residual;
  Padded<float> exp_avg, exp_avg_sq;
  Block padded = block;
  padded.grad = grad.load(block.grad, grad_bytes);
  padded.master = master.load(block.master, master_bytes);
  padded.residual = residual.load(block.residual, block.count);
  padded.exp_avg = exp_avg.load(block.exp_avg, block.count);
  padded.exp_avg_sq = exp_avg_sq.load(block.exp_avg_sq, block.count);
  padded.codes = codes.load(block.codes, used);
  const bool changed = run_block<Codec, kFormat>(step, padded);
  master.store(block.master, master_bytes);
  residual.store(block.residual, block.count);
  exp_avg.store(block.exp_avg, block.count);
  exp_avg_sq.store(block.exp_avg_sq, block.count);
  codes.store(block.codes, used);
  return changed;
}

// One moment of up to kMomentBlock weights in fp32: where it lies or, of 8 bits, in a buffer between load and store.
class Moment {
 public:
  Moment(const Dynamic8& map, void* data, float* absmax, int64_t row, int64_t cols)
      : map_(map),
        values_(absmax ? nullptr : static_cast<float*>(data) + row * cols),
        codes_(absmax ? static_cast<uint8_t*>(data) + row * cols : nullptr),
        absmax_(absmax ? absmax + row * num_moment_blocks(cols) : nullptr) {}

  float* load(int64_t start, int64_t count) {
    if (values_) return values_ + start;
    decode_moments(map_, codes_ + start, absmax_[start / kMomentBlock], count, buffer_);
    return buffer_;
  }

  void store(int64_t start, int64_t count) {
    if (!values_) absmax_[start / kMomentBlock] = encode_moments(map_, buffer_, count, codes_ + start);
  }

 private:
  const Dynamic8& map_;
  float* values_;
  uint8_t* codes_;
  float* absmax_;
  alignas(64) float buffer_[kMomentBlock];
};

template <class T>
USAF_ALWAYS_INLINE T* advanced(T* bytes, int64_t count) {
  using Byte = std::conditional_t<std::is_const_v<T>, const uint8_t, uint8_t>;
  return bytes ? static_cast<Byte*>(bytes) + count : nullptr;
}

// True if a bit of codes, absmax, master or residual changed.
template <class Codec, Format kFormat>
USAF_ALWAYS_INLINE bool run_row(const Step& step, int64_t row) {
  const MaskedAdamArgs& args = step.args;
  const int64_t cols = args.cols;
  Moment exp_avg(kDynamic8Signed, args.exp_avg, args.exp_avg_absmax, row, cols);
  Moment exp_avg_sq(kDynamic8Unsigned, args.exp_avg_sq, args.exp_avg_sq_absmax, row, cols);
  const int64_t absmax_bytes = kFormat == Format::bf16 ? 0 : scale_bytes(kFormat);
  uint8_t* codes = args.codes + row * code_bytes(kFormat, cols);
  auto* absmax = static_cast<uint8_t*>(args.absmax) + row * num_blocks(kFormat, cols) * absmax_bytes;
  bool changed = false;
  for (int64_t chunk = 0; chunk < cols; chunk += kMomentBlock) {
    const int64_t chunk_size = std::min(kMomentBlock, cols - chunk);
    float *m = exp_avg.load(chunk, chunk_size), *v = exp_avg_sq.load(chunk, chunk_size);
    for (int64_t i = 0; i < chunk_size; i += kBlockSize) {
      const int64_t element = row * cols + chunk + i, index = (chunk + i) / kBlockSize;
      const Block block{advanced(args.grad, element * element_size(args.grad_dtype)),
                        advanced(args.master, element * element_size(args.master_dtype)),
                        args.residual ? args.residual + element : nullptr,
                        m + i,
                        v + i,
                        codes + index * used_bytes(kFormat, kBlockSize),
                        absmax + index * absmax_bytes,
                        std::min(kBlockSize, chunk_size - i),
                        args.first_element + element};
      changed |= block.count == kBlockSize ? run_block<Codec, kFormat>(step, block)
                                           : run_short_block<Codec, kFormat>(step, block);
    }
    exp_avg.store(chunk, chunk_size);
    exp_avg_sq.store(chunk, chunk_size);
  }
  return changed;
}

template <Format kFormat>
bool run_row_plain(const Step& step, int64_t row) {
  return run_row<PlainCodec, kFormat>(step, row);
}

#ifdef USAF_HAS_ISA_LEVELS
template <Format kFormat>
USAF_AVX2 bool run_row_avx2(const Step& step, int64_t row) {
  return run_row<PlainCodec, kFormat>(step, row);
}

struct Avx512Codec {
  template <Format kFormat>
  USAF_AVX512 static void encode(const float* weight, int64_t count, const uint32_t* random, uint8_t* codes,
                                 void* absmax) {
    if constexpr (is_nf4(kFormat)) {
      if (count == kBlockSize && !random) {
        *static_cast<typename BlockCodec<kFormat>::Scale*>(absmax) = encode_nf4_block<kFormat>(weight, codes);
        return;
      }
    }
    PlainCodec::encode<kFormat>(weight, count, random, codes, absmax);
  }
  template <Format kFormat>
  USAF_AVX512 static void decode(const uint8_t* codes, const void* absmax, float* out) {
    if constexpr (is_nf4(kFormat)) {
      decode_nf4_blocks<kFormat>(codes, static_cast<const typename BlockCodec<kFormat>::Scale*>(absmax), 1, out);
    } else {
      PlainCodec::decode<kFormat>(codes, absmax, out);
    }
  }
};

template <Format kFormat>
USAF_AVX512 bool run_row_avx512(const Step& step, int64_t row) {
  return run_row<Avx512Codec, kFormat>(step, row);
}
#endif

using RunRow = bool (*)(const Step&, int64_t);

template <Format kFormat>
RunRow row_function_of() {
#ifdef USAF_HAS_ISA_LEVELS
  if (isa() == Isa::avx512) return run_row_avx512<kFormat>;
  if (isa() == Isa::avx2) return run_row_avx2<kFormat>;
#endif
  return run_row_plain<kFormat>;
}

RunRow row_function(Format format) {
  switch (format) {
    case Format::bf16:
      return row_function_of<Format::bf16>();
    case Format::nf4:
      return row_function_of<Format::nf4>();
    case Format::nf4_f16:
      return row_function_of<Format::nf4_f16>();
    case Format::int8:
      return row_function_of<Format::int8>();
    case Format::fp8:
      return row_function_of<Format::fp8>();
  }
  throw std::invalid_argument("format: unknown");
}

}  // namespace

void masked_adam(const MaskedAdamArgs& args, void*) {
  if (args.found_inf && *args.found_inf != 0.0f) return;
  const float grad_scale = args.grad_scale ? *args.grad_scale : 1.0f;
  const RunRow run_row = row_function(args.format);
  std::atomic<bool> changed{false};
  parallel_for(args.num_rows, args.cols, [&](int64_t r) {
    if (args.active && !args.active[r]) return;
    const int32_t step = args.step[r] + 1;
    const AdamScalars scalars = adam_scalars(args.lr, args.beta1, args.beta2, args.eps, args.weight_decay, step);
    if (run_row({args, scalars, step, grad_scale}, r)) changed.store(true, std::memory_order_relaxed);
    args.step[r] = step;
  });
  if (args.changed && changed.load(std::memory_order_relaxed)) *args.changed = 1;
}

}  // namespace usaf::cpu

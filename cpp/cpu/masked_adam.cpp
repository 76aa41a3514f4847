// Masked Adam: read a row, step it, write its new codes, in one pass over memory. Threads share the rows; a row goes
// through in blocks that stay in the first-level cache between the loops over them. Every row function exists once for
// each format and instruction set (isa.h).
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "../kernel_api.h"
#include "adam_avx512.h"
#include "adam_block.h"
#include "codec_generic.h"
#include "isa.h"
#include "moments8.h"
#include "parallel.h"

namespace usaf::cpu {
namespace {

// Replaces `count` bytes of `target`; true if any differs. Without a branch: whether codes change is a coin's toss.
USAF_ALWAYS_INLINE bool replace(uint8_t* __restrict target, const uint8_t* __restrict value, int64_t count) {
  uint8_t difference = 0;
  for (int64_t i = 0; i < count; ++i) {
    difference |= static_cast<uint8_t>(target[i] ^ value[i]);
    target[i] = value[i];
  }
  return difference != 0;
}

template <Format kFormat>
USAF_ALWAYS_INLINE void encode(const float* weight, int64_t count, const uint32_t* random, uint8_t* codes,
                               void* absmax) {
  if (random) {
    encode_stochastic_generic<kFormat>(weight, count, random, codes, absmax);
  } else {
    encode_row_generic<kFormat>(weight, count, codes, absmax);
  }
}

using FillRandom = void (*)(uint64_t seed, int32_t step, int64_t first, uint32_t* random);

void fill_random_plain(uint64_t seed, int32_t step, int64_t first, uint32_t* random) {
  fill_random(seed, step, first, random);
}

// True if a bit of codes, absmax, master or residual changed.
template <Format kFormat, FillRandom kFillRandom>
USAF_ALWAYS_INLINE bool run_block(const AdamStep& step, const AdamBlock& block) {
  const MaskedAdamArgs& args = step.args;
  const bool has_master = args.mode == AdamMode::master, has_residual = args.mode == AdamMode::residual;
  alignas(64) float weight[kBlockSize], decoded[kBlockSize], unit[kBlockSize];
  if (!has_master) {
    decode_row_generic<kFormat>(block.codes, block.absmax, kBlockSize, weight);
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
  alignas(64) uint8_t codes[2 * kBlockSize] = {};
  alignas(float) uint8_t scale[sizeof(float)];
  uint32_t random[kBlockSize];
  const bool stochastic = args.stochastic && !has_master && !has_residual;
  if (stochastic) kFillRandom(args.seed, step.step, block.first_element, random);
  encode<kFormat>(weight, block.count, stochastic ? random : nullptr, codes, scale);
  changed |= block.count == kBlockSize ? replace(block.codes, codes, used_bytes(kFormat, kBlockSize))
                                       : replace(block.codes, codes, used_bytes(kFormat, block.count));
  if constexpr (kFormat != Format::bf16) {
    changed |= replace(static_cast<uint8_t*>(block.absmax), scale, scale_bytes(kFormat));
  }

  if (has_residual) {
    decode_row_generic<kFormat>(codes, scale, kBlockSize, decoded);
    residual_units<kFormat>(codes, scale, unit);
    changed |= encode_residual(weight, decoded, unit, block.residual);
  } else if (args.mode == AdamMode::eco) {
    decode_row_generic<kFormat>(codes, scale, kBlockSize, decoded);
    carry_error(step.scalars, weight, decoded, block.exp_avg_sq, block.exp_avg);
  }
  return changed;
}

// A padded copy of the first `count` elements of `data`, written back by store(), which is true if a bit changed.
template <class T, int64_t kSize = kBlockSize>
struct Padded {
  alignas(64) T values[kSize] = {};
  T* load(const void* data, int64_t count) {
    if (data) std::memcpy(values, data, static_cast<size_t>(count) * sizeof(T));
    return values;
  }
  bool store(void* data, int64_t count) const {
    const auto bytes = static_cast<size_t>(count) * sizeof(T);
    if (!data || std::memcmp(data, values, bytes) == 0) return false;
    std::memcpy(data, values, bytes);
    return true;
  }
};

// A block shorter than 64. The padding takes part in the step, but neither in the block's scale nor in what is stored.
template <Format kFormat, FillRandom kFillRandom>
USAF_ALWAYS_INLINE bool run_short_block(const AdamStep& step, const AdamBlock& block) {
  const int64_t grad_bytes = block.count * element_size(step.args.grad_dtype);
  const int64_t master_bytes = block.count * element_size(step.args.master_dtype);
  const int64_t used = used_bytes(kFormat, block.count);
  const int64_t absmax_bytes = kFormat == Format::bf16 ? 0 : scale_bytes(kFormat);
  Padded<uint8_t, kBlockSize * sizeof(float)> grad, master;
  Padded<uint8_t, kBlockSize * sizeof(Bf16)> codes;
  Padded<uint8_t, sizeof(float)> absmax;
  Padded<int8_t> residual;
  Padded<float> exp_avg, exp_avg_sq;
  AdamBlock padded = block;
  padded.grad = grad.load(block.grad, grad_bytes);
  padded.master = master.load(block.master, master_bytes);
  padded.residual = residual.load(block.residual, block.count);
  padded.exp_avg = exp_avg.load(block.exp_avg, block.count);
  padded.exp_avg_sq = exp_avg_sq.load(block.exp_avg_sq, block.count);
  padded.codes = codes.load(block.codes, used);
  padded.absmax = absmax.load(block.absmax, absmax_bytes);
  run_block<kFormat, kFillRandom>(step, padded);
  exp_avg.store(block.exp_avg, block.count);
  exp_avg_sq.store(block.exp_avg_sq, block.count);
  bool changed = master.store(block.master, master_bytes);
  changed |= residual.store(block.residual, block.count);
  changed |= codes.store(block.codes, used);
  return absmax.store(block.absmax, absmax_bytes) || changed;
}

// One moment of up to kMomentBlock weights in fp32: where it lies or, of 8 bits, in a buffer between load and store.
class Moment {
 public:
  Moment(bool is_signed, void* data, float* absmax, int64_t row, int64_t cols)
      : is_signed_(is_signed),
        values_(absmax ? nullptr : static_cast<float*>(data) + row * cols),
        codes_(absmax ? static_cast<uint8_t*>(data) + row * cols : nullptr),
        absmax_(absmax ? absmax + row * num_moment_blocks(cols) : nullptr) {}

  float* load(int64_t start, int64_t count) {
    if (values_) return values_ + start;
    decode_moments(is_signed_, codes_ + start, absmax_[start / kMomentBlock], count, buffer_);
    return buffer_;
  }

  void store(int64_t start, int64_t count) {
    if (!values_) absmax_[start / kMomentBlock] = encode_moments(is_signed_, buffer_, count, codes_ + start);
  }

 private:
  bool is_signed_;
  float* values_;
  uint8_t* codes_;
  float* absmax_;
  alignas(64) float buffer_[kMomentBlock];
};

template <class T>
T* advanced(T* bytes, int64_t count) {
  using Byte = std::conditional_t<std::is_const_v<T>, const uint8_t, uint8_t>;
  return bytes ? static_cast<Byte*>(bytes) + count : nullptr;
}

// The blocks of one row, chunk by chunk of kMomentBlock weights.
template <Format kFormat>
class RowBlocks {
 public:
  RowBlocks(const MaskedAdamArgs& args, int64_t row)
      : args_(args),
        row_(row),
        exp_avg_(true, args.exp_avg, args.exp_avg_absmax, row, args.cols),
        exp_avg_sq_(false, args.exp_avg_sq, args.exp_avg_sq_absmax, row, args.cols) {}

  void load(int64_t chunk) {
    chunk_ = chunk;
    size_ = std::min(kMomentBlock, args_.cols - chunk);
    exp_avg_values_ = exp_avg_.load(chunk_, size_);
    exp_avg_sq_values_ = exp_avg_sq_.load(chunk_, size_);
  }
  void store() {
    exp_avg_.store(chunk_, size_);
    exp_avg_sq_.store(chunk_, size_);
  }
  int64_t size() const { return size_; }

  // The block at weight `i` of the chunk.
  AdamBlock at(int64_t i) const {
    constexpr int64_t kAbsmaxBytes = kFormat == Format::bf16 ? 0 : scale_bytes(kFormat);
    const int64_t index = (chunk_ + i) / kBlockSize, element = row_ * args_.cols + chunk_ + i;
    return {advanced(args_.grad, element * element_size(args_.grad_dtype)),
            advanced(args_.master, element * element_size(args_.master_dtype)),
            args_.residual ? args_.residual + element : nullptr,
            exp_avg_values_ + i,
            exp_avg_sq_values_ + i,
            args_.codes + row_ * code_bytes(kFormat, args_.cols) + index * used_bytes(kFormat, kBlockSize),
            advanced(args_.absmax, (row_ * num_blocks(kFormat, args_.cols) + index) * kAbsmaxBytes),
            std::min(kBlockSize, size_ - i),
            args_.first_element + element};
  }

 private:
  const MaskedAdamArgs& args_;
  int64_t row_, chunk_ = 0, size_ = 0;
  Moment exp_avg_, exp_avg_sq_;
  float *exp_avg_values_ = nullptr, *exp_avg_sq_values_ = nullptr;
};

// True if a bit of codes, absmax, master or residual changed.
template <Format kFormat, FillRandom kFillRandom>
USAF_ALWAYS_INLINE bool run_row(const AdamStep& step, int64_t row) {
  RowBlocks<kFormat> blocks(step.args, row);
  bool changed = false;
  for (int64_t chunk = 0; chunk < step.args.cols; chunk += kMomentBlock) {
    blocks.load(chunk);
    for (int64_t i = 0; i < blocks.size(); i += kBlockSize) {
      const AdamBlock block = blocks.at(i);
      changed |= block.count == kBlockSize ? run_block<kFormat, kFillRandom>(step, block)
                                           : run_short_block<kFormat, kFillRandom>(step, block);
    }
    blocks.store();
  }
  return changed;
}

template <Format kFormat>
bool run_row_plain(const AdamStep& step, int64_t row) {
  return run_row<kFormat, fill_random_plain>(step, row);
}

using RunRow = bool (*)(const AdamStep&, int64_t);

#ifdef USAF_HAS_ISA_LEVELS
template <Format kFormat>
USAF_AVX2 bool run_row_avx2(const AdamStep& step, int64_t row) {
  return run_row<kFormat, fill_random_plain>(step, row);
}

template <Format kFormat>
USAF_AVX512 bool run_row_avx512(const AdamStep& step, int64_t row) {
  return run_row<kFormat, fill_random_avx512>(step, row);
}

template <Format kFormat, AdamMode kMode, class Master, class Grad>
USAF_AVX512 bool run_nf4_row(const AdamStep& step, int64_t row) {
  RowBlocks<kFormat> blocks(step.args, row);
  __m512i difference = _mm512_setzero_si512();
  bool changed = false;
  for (int64_t chunk = 0; chunk < step.args.cols; chunk += kMomentBlock) {
    blocks.load(chunk);
    for (int64_t i = 0; i < blocks.size(); i += kBlockSize) {
      const AdamBlock block = blocks.at(i);
      if (block.count == kBlockSize) {
        run_nf4_block<kFormat, kMode, Master, Grad>(step, block, difference);
      } else {
        changed |= run_short_block<kFormat, fill_random_avx512>(step, block);
      }
    }
    blocks.store();
  }
  return changed || _mm512_test_epi32_mask(difference, difference) != 0;
}

template <Format kFormat, class Grad>
RunRow nf4_row_function(const MaskedAdamArgs& args) {
  switch (args.mode) {
    case AdamMode::in_place:
      return run_nf4_row<kFormat, AdamMode::in_place, float, Grad>;
    case AdamMode::residual:
      return run_nf4_row<kFormat, AdamMode::residual, float, Grad>;
    case AdamMode::eco:
      return run_nf4_row<kFormat, AdamMode::eco, float, Grad>;
    case AdamMode::master:
      break;
  }
  return args.master_dtype == DType::f32 ? run_nf4_row<kFormat, AdamMode::master, float, Grad>
                                         : run_nf4_row<kFormat, AdamMode::master, Bf16, Grad>;
}
#endif

template <Format kFormat>
RunRow row_function_of([[maybe_unused]] const MaskedAdamArgs& args) {
#ifdef USAF_HAS_ISA_LEVELS
  if (isa() == Isa::avx512) {
    if constexpr (is_nf4(kFormat)) {
      return args.grad_dtype == DType::f32 ? nf4_row_function<kFormat, float>(args)
                                           : nf4_row_function<kFormat, Bf16>(args);
    } else {
      return run_row_avx512<kFormat>;
    }
  }
  if (isa() == Isa::avx2) return run_row_avx2<kFormat>;
#endif
  return run_row_plain<kFormat>;
}

RunRow row_function(const MaskedAdamArgs& args) {
  switch (args.format) {
    case Format::bf16:
      return row_function_of<Format::bf16>(args);
    case Format::nf4:
      return row_function_of<Format::nf4>(args);
    case Format::nf4_f16:
      return row_function_of<Format::nf4_f16>(args);
    case Format::int8:
      return row_function_of<Format::int8>(args);
    case Format::fp8:
      return row_function_of<Format::fp8>(args);
  }
  throw std::invalid_argument("format: unknown");
}

}  // namespace

void masked_adam(const MaskedAdamArgs& args, void*) {
  if (args.found_inf && *args.found_inf != 0.0f) return;
  const float grad_scale = args.grad_scale ? *args.grad_scale : 1.0f;
  const RunRow run_row = row_function(args);
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

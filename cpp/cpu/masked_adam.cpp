// Masked Adam: read a row, step it, write its new codes, in one pass over memory. Threads share the rows; a row goes
// through in blocks that stay in the first-level cache between the loops over them.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "../kernel_api.h"
#include "../numerics/adam.h"
#include "../numerics/bfloat16.h"
#include "../numerics/residual.h"
#include "../numerics/rng.h"
#include "codec_row.h"
#include "moments8.h"
#include "parallel.h"
#include "simd.h"

namespace usaf::cpu {
namespace {

// Replaces `count` bytes or elements of `target`; true if any bit differs.
template <class T>
bool replace(T* target, const T* value, int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  if (std::memcmp(target, value, bytes) == 0) return false;
  std::memcpy(target, value, bytes);
  return true;
}

// Steps `weight` and its moments in place.
template <class Grad>
USAF_ALWAYS_INLINE void step_weights(const AdamScalars& scalars, float grad_scale, int64_t count,
                                     const Grad* __restrict grad, float* __restrict exp_avg,
                                     float* __restrict exp_avg_sq, float* __restrict weight) {
  for (int64_t i = 0; i < count; ++i) {
    const AdamState next = adam_step(scalars, {weight[i], exp_avg[i], exp_avg_sq[i]}, to_float(grad[i]) * grad_scale);
    weight[i] = next.weight;
    exp_avg[i] = next.exp_avg;
    exp_avg_sq[i] = next.exp_avg_sq;
  }
}

USAF_CLONES void step_block(const AdamScalars& scalars, float grad_scale, int64_t count, const float* grad,
                            float* exp_avg, float* exp_avg_sq, float* weight) {
  step_weights(scalars, grad_scale, count, grad, exp_avg, exp_avg_sq, weight);
}
USAF_CLONES void step_block(const AdamScalars& scalars, float grad_scale, int64_t count, const Bf16* grad,
                            float* exp_avg, float* exp_avg_sq, float* weight) {
  step_weights(scalars, grad_scale, count, grad, exp_avg, exp_avg_sq, weight);
}

USAF_CLONES void widen(const Bf16* __restrict values, int64_t count, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(values[i]);
}

// Rounds `weight` to bfloat16, in `rounded` and in place.
USAF_CLONES void round_block(int64_t count, float* __restrict weight, Bf16* __restrict rounded) {
  for (int64_t i = 0; i < count; ++i) {
    rounded[i] = to_bf16(weight[i]);
    weight[i] = to_float(rounded[i]);
  }
}

USAF_CLONES void add_residual(int64_t count, const int8_t* __restrict residual, const float* __restrict unit,
                              float* __restrict weight) {
  for (int64_t i = 0; i < count; ++i) weight[i] = weight[i] + static_cast<float>(residual[i]) * unit[i];
}

USAF_CLONES void encode_residual(int64_t count, const float* __restrict weight, const float* __restrict decoded,
                                 const float* __restrict unit, int8_t* __restrict residual) {
  for (int64_t i = 0; i < count; ++i) {
    residual[i] = static_cast<int8_t>(residual_encode(weight[i] - decoded[i], unit[i]));
  }
}

USAF_CLONES void carry_error(const AdamScalars& scalars, int64_t count, const float* __restrict weight,
                             const float* __restrict decoded, const float* __restrict exp_avg_sq,
                             float* __restrict exp_avg) {
  for (int64_t i = 0; i < count; ++i) {
    exp_avg[i] = eco_exp_avg(scalars, exp_avg[i], exp_avg_sq[i], weight[i] - decoded[i]);
  }
}

// The residuals' units of one block.
void residual_units(Format format, const uint8_t* codes, const uint8_t* absmax, int64_t count, float* unit) {
  if (format == Format::bf16) {
    const Bf16* code = reinterpret_cast<const Bf16*>(codes);
    for (int64_t i = 0; i < count; ++i) unit[i] = residual_unit(bf16_gap(code[i]), 1.0f);
    return;
  }
  float step;
  std::memcpy(&step, absmax, sizeof step);
  for (int64_t i = 0; i < count; ++i) {
    const int code = i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
    unit[i] = residual_unit(nf4_gap(code), step);
  }
}

void decode_block(Format format, const uint8_t* codes, const void* absmax, int64_t count, float* out) {
  decode_row(format, codes, static_cast<const float*>(absmax), count, out);
}

void encode_block(Format format, const float* weight, int64_t count, const uint32_t* random, uint8_t* codes,
                  void* absmax) {
  if (format == Format::nf4) {
    *static_cast<float*>(absmax) =
        random ? nf4_encode_block_stochastic(weight, count, random, codes) : nf4_encode_block(weight, count, codes);
    return;
  }
  Bf16* encoded = reinterpret_cast<Bf16*>(codes);
  for (int64_t i = 0; i < count; ++i) {
    encoded[i] = random ? to_bf16_stochastic(weight[i], random[i]) : to_bf16(weight[i]);
  }
}

// Random numbers of elements first .. first + count - 1.
void fill_random(uint64_t seed, int32_t step, int64_t first, int64_t count, uint32_t* random) {
  constexpr int64_t kMaxGroups = kBlockSize / kRandomsPerGroup + 1;
  const int64_t first_group = first / kRandomsPerGroup, skip = first % kRandomsPerGroup;
  Random4 group[kMaxGroups];
  for (int64_t g = 0; g < kMaxGroups; ++g) {
    group[g] = random_group(seed, step, static_cast<uint64_t>(first_group + g));
  }
  static_assert(sizeof group == kMaxGroups * kRandomsPerGroup * sizeof(uint32_t));
  std::memcpy(random, reinterpret_cast<const uint32_t*>(group) + skip, static_cast<size_t>(count) * sizeof *random);
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
  float buffer_[kMomentBlock];
};

class Row {
 public:
  Row(const MaskedAdamArgs& args, int64_t row, int32_t step, float grad_scale)
      : args_(args),
        row_(row),
        step_(step),
        scalars_(adam_scalars(args.lr, args.beta1, args.beta2, args.eps, args.weight_decay, step)),
        grad_scale_(grad_scale) {}

  // True if a bit of codes, absmax, master or residual changed.
  bool run() const {
    Moment exp_avg(kDynamic8Signed, args_.exp_avg, args_.exp_avg_absmax, row_, args_.cols);
    Moment exp_avg_sq(kDynamic8Unsigned, args_.exp_avg_sq, args_.exp_avg_sq_absmax, row_, args_.cols);
    const int64_t scale_step = num_blocks(args_.format, kBlockSize) * scale_bytes(args_.format);
    const int64_t code_step = used_bytes(args_.format, kBlockSize);
    uint8_t* codes = args_.codes + row_ * code_bytes(args_.format, args_.cols);
    uint8_t* absmax = static_cast<uint8_t*>(args_.absmax) + row_ * num_blocks(args_.format, args_.cols) * scale_step;
    bool changed = false;
    for (int64_t chunk = 0; chunk < args_.cols; chunk += kMomentBlock) {
      const int64_t chunk_size = std::min(kMomentBlock, args_.cols - chunk);
      float *m = exp_avg.load(chunk, chunk_size), *v = exp_avg_sq.load(chunk, chunk_size);
      for (int64_t i = 0; i < chunk_size; i += kBlockSize, codes += code_step, absmax += scale_step) {
        changed |= run_block({chunk + i, std::min(kBlockSize, chunk_size - i), m + i, v + i, codes, absmax});
      }
      exp_avg.store(chunk, chunk_size);
      exp_avg_sq.store(chunk, chunk_size);
    }
    return changed;
  }

 private:
  struct Block {
    int64_t start, count;
    float *exp_avg, *exp_avg_sq;
    uint8_t *codes, *absmax;
  };

  int64_t element(const Block& block) const { return row_ * args_.cols + block.start; }

  bool run_block(const Block& block) const {
    switch (args_.mode) {
      case AdamMode::master:
        return args_.master_dtype == DType::f32 ? run_master_f32(block) : run_master_bf16(block);
      case AdamMode::residual:
        return run_residual(block);
      default:
        return run_codes(block);
    }
  }

  void step_block_of(const Block& block, float* weight) const {
    if (args_.grad_dtype == DType::f32) {
      step_block(scalars_, grad_scale_, block.count, static_cast<const float*>(args_.grad) + element(block),
                 block.exp_avg, block.exp_avg_sq, weight);
    } else {
      step_block(scalars_, grad_scale_, block.count, static_cast<const Bf16*>(args_.grad) + element(block),
                 block.exp_avg, block.exp_avg_sq, weight);
    }
  }

  bool run_master_f32(const Block& block) const {
    float* master = static_cast<float*>(args_.master) + element(block);
    float weight[kBlockSize];
    std::memcpy(weight, master, static_cast<size_t>(block.count) * sizeof *weight);
    step_block_of(block, weight);
    const bool changed = replace(master, weight, block.count);
    return encode(block, weight, nullptr) || changed;
  }

  bool run_master_bf16(const Block& block) const {
    Bf16* master = static_cast<Bf16*>(args_.master) + element(block);
    float weight[kBlockSize];
    Bf16 rounded[kBlockSize];
    widen(master, block.count, weight);
    step_block_of(block, weight);
    round_block(block.count, weight, rounded);
    const bool changed = replace(master, rounded, block.count);
    return encode(block, weight, nullptr) || changed;
  }

  bool run_residual(const Block& block) const {
    int8_t* residual = args_.residual + element(block);
    float weight[kBlockSize], unit[kBlockSize], decoded[kBlockSize];
    int8_t encoded[kBlockSize];
    decode_block(args_.format, block.codes, block.absmax, block.count, weight);
    residual_units(args_.format, block.codes, block.absmax, block.count, unit);
    add_residual(block.count, residual, unit, weight);
    step_block_of(block, weight);
    const bool changed = encode(block, weight, nullptr);
    decode_block(args_.format, block.codes, block.absmax, block.count, decoded);
    residual_units(args_.format, block.codes, block.absmax, block.count, unit);
    encode_residual(block.count, weight, decoded, unit, encoded);
    return replace(residual, encoded, block.count) || changed;
  }

  // in_place and eco.
  bool run_codes(const Block& block) const {
    float weight[kBlockSize];
    uint32_t random[kBlockSize];
    decode_block(args_.format, block.codes, block.absmax, block.count, weight);
    step_block_of(block, weight);
    if (args_.stochastic) {
      fill_random(args_.seed, step_, args_.first_element + element(block), block.count, random);
    }
    const bool changed = encode(block, weight, args_.stochastic ? random : nullptr);
    if (args_.mode == AdamMode::eco) {
      float decoded[kBlockSize];
      decode_block(args_.format, block.codes, block.absmax, block.count, decoded);
      carry_error(scalars_, block.count, weight, decoded, block.exp_avg_sq, block.exp_avg);
    }
    return changed;
  }

  // The new codes, rounded to nearest or (random not null) stochastically. True if a bit changed.
  bool encode(const Block& block, const float* weight, const uint32_t* random) const {
    uint8_t encoded[2 * kBlockSize], scale[sizeof(float)];
    encode_block(args_.format, weight, block.count, random, encoded, scale);
    const bool changed = replace(block.codes, encoded, used_bytes(args_.format, block.count));
    return replace(block.absmax, scale, num_blocks(args_.format, 1) * scale_bytes(args_.format)) || changed;
  }

  const MaskedAdamArgs& args_;
  int64_t row_;
  int32_t step_;  // counting this one
  AdamScalars scalars_;
  float grad_scale_;
};

}  // namespace

void masked_adam(const MaskedAdamArgs& args, void*) {
  if (args.found_inf && *args.found_inf != 0.0f) return;
  const float grad_scale = args.grad_scale ? *args.grad_scale : 1.0f;
  std::atomic<bool> changed{false};
  parallel_for(args.num_rows, args.cols, [&](int64_t r) {
    if (args.active && !args.active[r]) return;
    const int32_t step = args.step[r] + 1;
    if (Row(args, r, step, grad_scale).run()) changed.store(true, std::memory_order_relaxed);
    args.step[r] = step;
  });
  if (args.changed && changed.load(std::memory_order_relaxed)) *args.changed = 1;
}

}  // namespace usaf::cpu

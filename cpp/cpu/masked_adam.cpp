// Masked Adam: read a row, step it, write its new codes, in one pass over memory. Threads share the rows.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "../kernel_api.h"
#include "../numerics/adam.h"
#include "../numerics/bfloat16.h"
#include "../numerics/rng.h"
#include "codec_row.h"
#include "parallel.h"

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

// Gradients and moments of one block.
struct Block {
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  int64_t count;
};

// Steps `weight` in place.
USAF_CLONES void step_block(const AdamScalars& scalars, float grad_scale, const Block& block,
                            float* __restrict weight) {
  const float* __restrict grad = block.grad;
  float* __restrict exp_avg = block.exp_avg;
  float* __restrict exp_avg_sq = block.exp_avg_sq;
  for (int64_t i = 0; i < block.count; ++i) {
    const AdamState next = adam_step(scalars, {weight[i], exp_avg[i], exp_avg_sq[i]}, grad[i] * grad_scale);
    weight[i] = next.weight;
    exp_avg[i] = next.exp_avg;
    exp_avg_sq[i] = next.exp_avg_sq;
  }
}

USAF_CLONES void widen(const Bf16* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(values[i]);
}

// Rounds `weight` to bfloat16, in `rounded` and in place.
USAF_CLONES void round_block(int64_t count, float* __restrict weight, Bf16* __restrict rounded) {
  for (int64_t i = 0; i < count; ++i) {
    rounded[i] = to_bf16(weight[i]);
    weight[i] = to_float(rounded[i]);
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

struct Row {
  const MaskedAdamArgs& args;
  int64_t row;
  int32_t step;  // counting this one
  AdamScalars scalars;
  float grad_scale;

  Block block_at(int64_t start, int64_t count) const {
    const int64_t element = row * args.cols + start;
    return {args.grad + element, args.exp_avg + element, args.exp_avg_sq + element, count};
  }

  // Steps the master of one block; `weight` becomes its new values. True if a bit changed.
  bool step_master(int64_t start, int64_t count, float* weight) const {
    const int64_t element = row * args.cols + start;
    if (args.master_dtype == DType::f32) {
      float* master = static_cast<float*>(args.master) + element;
      std::memcpy(weight, master, static_cast<size_t>(count) * sizeof *weight);
      step_block(scalars, grad_scale, block_at(start, count), weight);
      return replace(master, weight, count);
    }
    Bf16* master = static_cast<Bf16*>(args.master) + element;
    Bf16 rounded[kBlockSize];
    widen(master, count, weight);
    step_block(scalars, grad_scale, block_at(start, count), weight);
    round_block(count, weight, rounded);
    return replace(master, rounded, count);
  }

  // The new codes of one block of nearest rounding, or (random not null) of stochastic rounding. True if a bit changed.
  bool encode(const float* weight, int64_t count, const uint32_t* random, uint8_t* codes, uint8_t* absmax) const {
    uint8_t encoded[2 * kBlockSize];
    alignas(float) uint8_t scale[sizeof(float)];
    encode_block(args.format, weight, count, random, encoded, scale);
    const bool changed = replace(codes, encoded, used_bytes(args.format, count));
    if (args.format == Format::bf16) return changed;
    return replace(absmax, scale, scale_bytes(args.format)) || changed;
  }

  // True if a bit of codes, absmax or master changed.
  bool run() const {
    const int64_t scale_step = num_blocks(args.format, kBlockSize) * scale_bytes(args.format);
    const int64_t code_step = used_bytes(args.format, kBlockSize);
    uint8_t* codes = args.codes + row * code_bytes(args.format, args.cols);
    uint8_t* absmax = static_cast<uint8_t*>(args.absmax) + row * num_blocks(args.format, args.cols) * scale_step;
    bool changed = false;
    float weight[kBlockSize];
    uint32_t random[kBlockSize];
    for (int64_t start = 0; start < args.cols; start += kBlockSize, codes += code_step, absmax += scale_step) {
      const int64_t count = std::min(kBlockSize, args.cols - start);
      if (args.mode == AdamMode::master) {
        changed |= step_master(start, count, weight);
        changed |= encode(weight, count, nullptr, codes, absmax);
      } else {
        decode_block(args.format, codes, absmax, count, weight);
        step_block(scalars, grad_scale, block_at(start, count), weight);
        fill_random(args.seed, step, args.first_element + row * args.cols + start, count, random);
        changed |= encode(weight, count, random, codes, absmax);
      }
    }
    return changed;
  }
};

}  // namespace

void masked_adam(const MaskedAdamArgs& args, void*) {
  if (args.found_inf && *args.found_inf != 0.0f) return;
  const float grad_scale = args.grad_scale ? *args.grad_scale : 1.0f;
  std::atomic<bool> changed{false};
  parallel_for(args.num_rows, args.cols, [&](int64_t r) {
    if (args.active && !args.active[r]) return;
    const int32_t step = args.step[r] + 1;
    const AdamScalars scalars = adam_scalars(args.lr, args.beta1, args.beta2, args.eps, args.weight_decay, step);
    if (Row{args, r, step, scalars, grad_scale}.run()) changed.store(true, std::memory_order_relaxed);
    args.step[r] = step;
  });
  if (args.changed && changed.load(std::memory_order_relaxed)) *args.changed = 1;
}

}  // namespace usaf::cpu

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
#include "typed.h"

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

USAF_CLONES void step_block(const AdamScalars& scalars, int64_t count, float grad_scale, const float* grad,
                            float* exp_avg, float* exp_avg_sq, float* weight) {
  for (int64_t i = 0; i < count; ++i) {
    const AdamState next = adam_step(scalars, {weight[i], exp_avg[i], exp_avg_sq[i]}, grad[i] * grad_scale);
    weight[i] = next.weight;
    exp_avg[i] = next.exp_avg;
    exp_avg_sq[i] = next.exp_avg_sq;
  }
}

// Random numbers of elements first .. first + count - 1.
void fill_random(uint64_t seed, int32_t step, int64_t first, int64_t count, uint32_t* random) {
  uint32_t groups[kBlockSize + 2 * kRandomsPerGroup];
  const int64_t first_group = first / kRandomsPerGroup, last_group = (first + count - 1) / kRandomsPerGroup;
  for (int64_t group = first_group; group <= last_group; ++group) {
    const Random4 four = random_group(seed, step, static_cast<uint64_t>(group));
    std::memcpy(groups + (group - first_group) * kRandomsPerGroup, four.value, sizeof four.value);
  }
  std::memcpy(random, groups + (first - first_group * kRandomsPerGroup), static_cast<size_t>(count) * sizeof *random);
}

struct Row {
  const MaskedAdamArgs& args;
  int64_t row;
  int32_t step;  // counting this one
  AdamScalars scalars;
  float grad_scale;

  // `weight` holds the block's values before the step. True if a stored bit changed.
  bool step_master_block(int64_t start, int64_t count, float* weight) const {
    const int64_t element = row * args.cols + start;
    bool changed = false;
    with_type(args.master_dtype, [&]<class T>(T) {
      T* master = static_cast<T*>(args.master) + element;
      for (int64_t i = 0; i < count; ++i) weight[i] = to_float(master[i]);
      advance(element, count, weight);
      T rounded[kBlockSize];
      for (int64_t i = 0; i < count; ++i) rounded[i] = from_float<T>(weight[i]);
      for (int64_t i = 0; i < count; ++i) weight[i] = to_float(rounded[i]);
      changed = replace(master, rounded, count);
    });
    return changed;
  }

  void advance(int64_t element, int64_t count, float* weight) const {
    step_block(scalars, count, grad_scale, args.grad + element, args.exp_avg + element, args.exp_avg_sq + element,
               weight);
  }

  bool run() const {
    const bool nf4 = args.format == Format::nf4;
    uint8_t* codes = args.codes + row * code_bytes(args.format, args.cols);
    float* absmax = args.absmax + row * num_blocks(args.format, args.cols);
    bool changed = false;
    float weight[kBlockSize];
    uint32_t random[kBlockSize];
    for (int64_t start = 0, block = 0; start < args.cols; start += kBlockSize, ++block) {
      const int64_t count = std::min(kBlockSize, args.cols - start);
      uint8_t* block_codes = codes + (nf4 ? start / 2 : 2 * start);
      const bool in_place = args.mode == AdamMode::in_place;
      if (in_place) {
        decode_row(args.format, block_codes, absmax + (nf4 ? block : 0), count, weight);
        advance(row * args.cols + start, count, weight);
        fill_random(args.seed, step, args.first_element + row * args.cols + start, count, random);
      } else {
        changed |= step_master_block(start, count, weight);
      }
      if (nf4) {
        uint8_t encoded[kBlockBytes];
        const float new_absmax = in_place ? nf4_encode_block_stochastic(weight, count, random, encoded)
                                          : nf4_encode_block(weight, count, encoded);
        changed |= replace(block_codes, encoded, (count + 1) / 2);
        changed |= replace(absmax + block, &new_absmax, 1);
      } else {
        Bf16 encoded[kBlockSize];
        for (int64_t i = 0; i < count; ++i) {
          encoded[i] = in_place ? to_bf16_stochastic(weight[i], random[i]) : to_bf16(weight[i]);
        }
        changed |= replace(reinterpret_cast<Bf16*>(block_codes), encoded, count);
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

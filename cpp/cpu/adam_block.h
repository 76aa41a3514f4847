// The loops of masked Adam over one block of 64 weights, plain, to be inlined into a function of each instruction set
// (isa.h), where the compiler vectorises them. They always run over the whole block: short ones are padded.
#pragma once
#include <cstdint>
#include <cstring>

#include "../kernel_api.h"
#include "../numerics/adam.h"
#include "../numerics/bfloat16.h"
#include "../numerics/block_codec.h"
#include "../numerics/residual.h"
#include "../numerics/rng.h"
#include "simd.h"

namespace usaf::cpu {

// What one block is stepped from and into, each of 64 elements: pad what is shorter.
struct AdamBlock {
  const void* grad;
  void* master;
  int8_t* residual;
  float *exp_avg, *exp_avg_sq;
  uint8_t* codes;
  void* absmax;
  int64_t count;          // weights; codes after theirs are not written
  int64_t first_element;  // in the noise
};

struct AdamStep {
  const MaskedAdamArgs& args;
  AdamScalars scalars;
  int32_t step;  // counting this one
  float grad_scale;
};

// Steps `weight` and its moments in place.
template <class Grad>
USAF_ALWAYS_INLINE void step_block(const AdamScalars& scalars, float grad_scale, const Grad* __restrict grad,
                                   float* __restrict exp_avg, float* __restrict exp_avg_sq, float* __restrict weight) {
  for (int64_t i = 0; i < kBlockSize; ++i) {
    const AdamState next = adam_step(scalars, {weight[i], exp_avg[i], exp_avg_sq[i]}, to_float(grad[i]) * grad_scale);
    weight[i] = next.weight;
    exp_avg[i] = next.exp_avg;
    exp_avg_sq[i] = next.exp_avg_sq;
  }
}

template <class Master>
USAF_ALWAYS_INLINE void load_block(const Master* __restrict master, float* __restrict weight) {
  for (int64_t i = 0; i < kBlockSize; ++i) weight[i] = to_float(master[i]);
}

// Rounds `weight` to the master's type, there and in place. True if a bit of the master changed.
USAF_ALWAYS_INLINE bool store_block(float* __restrict weight, float* __restrict master) {
  uint32_t difference = 0;
  for (int64_t i = 0; i < kBlockSize; ++i) {
    difference |= float_bits(weight[i]) ^ float_bits(master[i]);
    master[i] = weight[i];
  }
  return difference != 0;
}

USAF_ALWAYS_INLINE bool store_block(float* __restrict weight, Bf16* __restrict master) {
  uint32_t difference = 0;
  for (int64_t i = 0; i < kBlockSize; ++i) {
    const uint16_t rounded = to_bf16(weight[i]).bits;  // as a number: structs keep GCC from vectorising
    difference |= static_cast<uint32_t>(rounded ^ master[i].bits);
    master[i].bits = rounded;
    weight[i] = to_float(Bf16{rounded});
  }
  return difference != 0;
}

// The residuals' units of a block.
template <Format kFormat>
USAF_ALWAYS_INLINE void residual_units(const uint8_t* __restrict codes, const void* absmax, float* __restrict unit) {
  if constexpr (kFormat == Format::bf16) {
    const auto* code = reinterpret_cast<const Bf16*>(codes);
    for (int64_t i = 0; i < kBlockSize; ++i) unit[i] = residual_unit(residual_gap<kFormat>(code[i].bits), 1.0f);
  } else {
    using Codec = BlockCodec<kFormat>;
    typename Codec::Scale scale;
    std::memcpy(&scale, absmax, sizeof scale);
    const float step = Codec::step(scale);
    if constexpr (is_nf4(kFormat)) {
      float units[16];
      for (uint32_t code = 0; code < 16; ++code) units[code] = residual_unit(residual_gap<kFormat>(code), step);
      for (int64_t i = 0; i < kBlockSize / 2; ++i) {
        unit[2 * i] = units[codes[i] >> 4];
        unit[2 * i + 1] = units[codes[i] & 15];
      }
    } else {
      for (int64_t i = 0; i < kBlockSize; ++i) unit[i] = residual_unit(residual_gap<kFormat>(codes[i]), step);
    }
  }
}

USAF_ALWAYS_INLINE void add_residual(const int8_t* __restrict residual, const float* __restrict unit,
                                     float* __restrict weight) {
  for (int64_t i = 0; i < kBlockSize; ++i) weight[i] = weight[i] + static_cast<float>(residual[i]) * unit[i];
}

// True if a bit of the residual changed.
USAF_ALWAYS_INLINE bool encode_residual(const float* __restrict weight, const float* __restrict decoded,
                                        const float* __restrict unit, int8_t* __restrict residual) {
  int32_t difference = 0;
  for (int64_t i = 0; i < kBlockSize; ++i) {
    const int32_t encoded = residual_encode(weight[i] - decoded[i], unit[i]);
    difference |= encoded ^ residual[i];
    residual[i] = static_cast<int8_t>(encoded);
  }
  return difference != 0;
}

USAF_ALWAYS_INLINE void carry_error(const AdamScalars& scalars, const float* __restrict weight,
                                    const float* __restrict decoded, const float* __restrict exp_avg_sq,
                                    float* __restrict exp_avg) {
  for (int64_t i = 0; i < kBlockSize; ++i) {
    exp_avg[i] = eco_exp_avg(scalars, exp_avg[i], exp_avg_sq[i], weight[i] - decoded[i]);
  }
}

// Random numbers of elements first .. first + 63.
USAF_ALWAYS_INLINE void fill_random(uint64_t seed, int32_t step, int64_t first, uint32_t* __restrict random) {
  constexpr int64_t kGroups = kBlockSize / kRandomsPerGroup;
  const auto group = static_cast<uint64_t>(first / kRandomsPerGroup);
  const int64_t skip = first % kRandomsPerGroup;
  uint32_t numbers[kBlockSize + kRandomsPerGroup];
  for (int64_t g = 0; g < kGroups; ++g) {
    const Random4 four = random_group(seed, step, group + static_cast<uint64_t>(g));
    for (int64_t i = 0; i < kRandomsPerGroup; ++i) numbers[g * kRandomsPerGroup + i] = four.value[i];
  }
  if (skip != 0) {
    const Random4 last = random_group(seed, step, group + kGroups);
    std::memcpy(numbers + kBlockSize, last.value, sizeof last.value);
  }
  std::memcpy(random, numbers + skip, kBlockSize * sizeof *random);
}

}  // namespace usaf::cpu

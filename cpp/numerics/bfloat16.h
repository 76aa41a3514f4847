// bfloat16 as its 16 bits: conversion to and from float, round to nearest even (IEEE 754; NaN stays a quiet NaN).
#pragma once
#include <cstdint>

#include "float_bits.h"
#include "host_device.h"

namespace usaf {

struct Bf16 {
  uint16_t bits;
};
static_assert(sizeof(Bf16) == 2, "bfloat16 is two bytes");

USAF_HD float to_float(Bf16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

USAF_HD Bf16 to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return Bf16{static_cast<uint16_t>(is_nan ? quiet_nan : rounded)};
}

// Several in words, the first of each two in the low half. NVIDIA GPUs from sm_80 on have an instruction for two, whose
// only difference is that it makes every NaN the same one.
template <int kPairs>
USAF_HD void to_bf16_pairs(const float (&value)[2 * kPairs], uint32_t (&pairs)[kPairs]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bool is_nan = false;
  for (int i = 0; i < kPairs; ++i) {
    const float low = value[2 * i], high = value[2 * i + 1];
    is_nan |= !(low <= high || low > high);  // one test for both
  }
  if (!is_nan) {
    for (int i = 0; i < kPairs; ++i) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pairs[i]) : "f"(value[2 * i + 1]), "f"(value[2 * i]));
    }
    return;
  }
#endif
  for (int i = 0; i < kPairs; ++i) {
    pairs[i] = to_bf16(value[2 * i]).bits | static_cast<uint32_t>(to_bf16(value[2 * i + 1]).bits) << 16;
  }
}

// Stochastic rounding: up with a probability equal to the discarded fraction. The low 16 bits of `random` decide.
USAF_HD Bf16 to_bf16_stochastic(float value, uint32_t random) {
  const uint32_t bits = float_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? to_bf16(value) : Bf16{static_cast<uint16_t>((bits + (random & 0xffffu)) >> 16)};
}

template <>
USAF_HD Bf16 from_float<Bf16>(float value) {
  return to_bf16(value);
}

}  // namespace usaf

// IEEE binary16 as its 16 bits: conversion to and from float, round to nearest even, subnormals kept, overflow to
// infinity, NaN to some quiet NaN. On a GPU by its own instructions; elsewhere by integer operations and two exact fp32
// sums on values that are never subnormal: the same bits, whatever the flush-to-zero mode.
#pragma once
#include <cstdint>

#include "float_bits.h"
#include "host_device.h"

namespace usaf {

struct F16 {
  uint16_t bits;
};
static_assert(sizeof(F16) == 2, "binary16 is two bytes");

inline constexpr float kF16Max = 65504.0f;

USAF_HD float to_float(F16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#elif defined(__HIP_DEVICE_COMPILE__)
  _Float16 half;
  memcpy(&half, &value, sizeof half);
  return static_cast<float>(half);
#else
  constexpr uint32_t kRebias = (127u - 15u) << 23, kSmallestNormal = 113u << 23;  // 2^-14 as fp32
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t normal = magnitude + kRebias;
  // A subnormal m * 2^-24 is (1 + m / 1024) * 2^-14 - 2^-14, exactly.
  const uint32_t subnormal = float_bits(bits_float(magnitude | kSmallestNormal) - bits_float(kSmallestNormal));
  uint32_t bits = magnitude < (0x400u << 13) ? subnormal : normal;
  bits = magnitude >= (0x7c00u << 13) ? normal + kRebias : bits;  // infinity and NaN: exponent 255
  return bits_float(bits | sign);
#endif
}

USAF_HD F16 to_f16(float value) {
#if defined(__CUDA_ARCH__)
  F16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#elif defined(__HIP_DEVICE_COMPILE__)
  // Else clang 17 and newer make v_fma_mixlo_f16 of a product and its conversion, and a product of -0 becomes +0.
  USAF_OPAQUE(value);
  const _Float16 half = static_cast<_Float16>(value);
  F16 result;
  memcpy(&result, &half, sizeof result);
  return result;
#else
  constexpr uint32_t kRebias = (127u - 15u) << 23, kSmallestNormal = 113u << 23, kPastLargest = 143u << 23;  // 2^16
  const uint32_t sign = float_bits(value) & 0x80000000u;
  const uint32_t magnitude = float_bits(value) ^ sign;
  // 0.5's last bit is worth 2^-24, the smallest subnormal: the sum rounds to a multiple of it.
  const uint32_t small = float_bits(bits_float(magnitude < kSmallestNormal ? magnitude : 0u) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (magnitude - kRebias + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t bits = magnitude < kSmallestNormal ? small : normal;
  bits = magnitude >= kPastLargest ? 0x7c00u : bits;
  bits = magnitude > 0x7f800000u ? 0x7e00u : bits;
  return F16{static_cast<uint16_t>(bits | (sign >> 16))};
#endif
}

// The smallest binary16 that is at least `value`; `value` is not negative.
USAF_HD F16 to_f16_up(float value) {
  const F16 nearest = to_f16(value);
  return F16{static_cast<uint16_t>(nearest.bits + (to_float(nearest) < value ? 1u : 0u))};
}

template <>
USAF_HD F16 from_float<F16>(float value) {
  return to_f16(value);
}

}  // namespace usaf

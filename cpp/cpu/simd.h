// Sixteen floats at a time in the compiler's portable vectors: it maps them to whatever the clone's instruction set has
// (one AVX-512 register, two AVX2 ones, four SSE ones) without changing a bit.
#pragma once
#include <cstdint>
#include <cstring>

#include "../numerics/bfloat16.h"
#include "../numerics/float16.h"

namespace usaf::cpu {

#define USAF_ALWAYS_INLINE inline __attribute__((always_inline))

inline constexpr int64_t kLanes = 16;
using Lanes = float __attribute__((vector_size(64)));

USAF_ALWAYS_INLINE void load_lanes(const float* values, Lanes& lanes) { std::memcpy(&lanes, values, sizeof lanes); }

USAF_ALWAYS_INLINE void load_lanes(const Bf16* values, Lanes& lanes) {
  using Halves = uint16_t __attribute__((vector_size(32)));
  using Words = uint32_t __attribute__((vector_size(64)));
  Halves halves;
  std::memcpy(&halves, values, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  std::memcpy(&lanes, &words, sizeof lanes);
}

// to_float(F16) of numerics/float16.h, lane by lane.
USAF_ALWAYS_INLINE void load_lanes(const F16* values, Lanes& lanes) {
  float wide[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) wide[i] = to_float(values[i]);
  std::memcpy(&lanes, wide, sizeof lanes);
}

USAF_ALWAYS_INLINE void store_lanes(const Lanes& lanes, float* values) { std::memcpy(values, &lanes, sizeof lanes); }

template <class T>
USAF_ALWAYS_INLINE void store_lanes(const Lanes& lanes, T* values) {
  float wide[kLanes];
  std::memcpy(wide, &lanes, sizeof lanes);
  for (int64_t i = 0; i < kLanes; ++i) values[i] = from_float<T>(wide[i]);
}

// The lanes' sum as a tree: lane i with i + 8, then i + 4, i + 2, i + 1.
USAF_ALWAYS_INLINE float sum_lanes(const Lanes& lanes) {
  float value[kLanes];
  std::memcpy(value, &lanes, sizeof value);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) value[i] += value[i + half];
  }
  return value[0];
}

// <a, b> in fp32: lane-wise partial sums in ascending order, their tree, then the tail one by one.
template <class T>
USAF_ALWAYS_INLINE float dot(const T* a, const T* b, int64_t count) {
  Lanes sum = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Lanes left, right;
    load_lanes(a + i, left);
    load_lanes(b + i, right);
    sum += left * right;
  }
  float total = sum_lanes(sum);
  for (; i < count; ++i) total += to_float(a[i]) * to_float(b[i]);
  return total;
}

}  // namespace usaf::cpu

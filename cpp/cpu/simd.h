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
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

USAF_ALWAYS_INLINE void load_lanes(const float* values, Lanes& lanes) { std::memcpy(&lanes, values, sizeof lanes); }

USAF_ALWAYS_INLINE void load_lanes(const Bf16* values, Lanes& lanes) {
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

// to_bf16 of numerics/bfloat16.h in the high halves.
USAF_ALWAYS_INLINE void round_to_bf16(const Lanes& lanes, Words& words) {
  Words bits;
  std::memcpy(&bits, &lanes, sizeof bits);
  const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words is_nan = Words((bits & 0x7fffffffu) > 0x7f800000u);
  words = (is_nan & (bits | 0x400000u)) | (~is_nan & nearest);
}
USAF_ALWAYS_INLINE void store_lanes(const Lanes& lanes, Bf16* values) {
  Words words;
  round_to_bf16(lanes, words);
  const Halves halves = __builtin_convertvector(words >> 16, Halves);
  std::memcpy(values, &halves, sizeof halves);
}

// The numbers of one cache line. Which lane holds which column is up to the type: a sum over rows does not mind.
inline constexpr int64_t kLineBytes = 64;
template <class T>
inline constexpr int64_t kLineLanes = kLineBytes / (static_cast<int64_t>(sizeof(T)) * kLanes);
template <class T>
using Line = Lanes[kLineLanes<T>];

template <class T>
USAF_ALWAYS_INLINE void load_line(const T* values, Line<T>& line) {
  for (int64_t i = 0; i < kLineLanes<T>; ++i) load_lanes(values + i * kLanes, line[i]);
}
template <class T>
USAF_ALWAYS_INLINE void store_line(const Line<T>& line, T* values) {
  for (int64_t i = 0; i < kLineLanes<T>; ++i) store_lanes(line[i], values + i * kLanes);
}

// Even columns, then odd ones: the low and the high halves of 16 words (little-endian, as all our targets).
USAF_ALWAYS_INLINE void load_line(const Bf16* values, Line<Bf16>& line) {
  Words words;
  std::memcpy(&words, values, sizeof words);
  const Words even = words << 16, odd = words & 0xffff0000u;
  std::memcpy(&line[0], &even, sizeof even);
  std::memcpy(&line[1], &odd, sizeof odd);
}
USAF_ALWAYS_INLINE void store_line(const Line<Bf16>& line, Bf16* values) {
  Words even, odd;
  round_to_bf16(line[0], even);
  round_to_bf16(line[1], odd);
  const Words words = (even >> 16) | (odd & 0xffff0000u);
  std::memcpy(values, &words, sizeof words);
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

template <class T>
USAF_ALWAYS_INLINE void add_products(const T* a, const T* b, Lanes& sum) {
  Lanes left, right;
  load_lanes(a, left);
  load_lanes(b, right);
  sum += left * right;
}
// The rest of dot: from column `i` on, a multiple of kLanes, with the lane-wise sums of those before.
template <class T>
USAF_ALWAYS_INLINE float end_dot(const T* a, const T* b, int64_t i, int64_t count, Lanes sum) {
  for (; i + kLanes <= count; i += kLanes) add_products(a + i, b + i, sum);
  float total = sum_lanes(sum);
  for (; i < count; ++i) total += to_float(a[i]) * to_float(b[i]);
  return total;
}
// <a, b> in fp32: lane-wise partial sums in ascending order, their tree, then the tail one by one.
template <class T>
USAF_ALWAYS_INLINE float dot(const T* a, const T* b, int64_t count) {
  return end_dot(a, b, 0, count, Lanes{});
}

}  // namespace usaf::cpu

// Gated activations: value and derivative, in fp32.
//
//   silu            h = g * sigmoid(g) * u
//   gelu_tanh       h = gelu(g) * u, gelu(g) = g/2 * (1 + tanh(z)) = g * sigmoid(2 z), z = sqrt(2/pi) (g + 0.044715
//   g^3)
//                   (Hendrycks and Gimpel, arXiv 1606.08415)
//   swiglu_clamped  h = c * sigmoid(1.702 c) * (d + 1), c = min(g, 7), d = clamp(u, -7, 7) (gpt-oss)
//
// All three need only a sigmoid. It is built on an exponential of + - * and bit operations (2^n times the Taylor
// polynomial of degree 7 on [-ln2/2, ln2/2], relative error under 3 ulp), not on libm: loops over it vectorise, and its
// bits do not depend on the C library.
#pragma once
#include <cstdint>

#include "bfloat16.h"
#include "host_device.h"

namespace usaf {

inline constexpr float kClampedLimit = 7.0f;
inline constexpr float kClampedAlpha = 1.702f;

// e^x where that is a normal number; e^-87 below, infinity above 88. NaN stays NaN.
USAF_HD float exp_normal(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the high part times n is exact
  const bool overflows = x > 88.0f;
  x = x < -87.0f ? -87.0f : x;
  x = overflows ? 88.0f : x;
  const float shifted = x * kLog2E + kShift;
  const float n = shifted - kShift;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float sum = 1.0f / 5040.0f;
  sum = sum * r + 1.0f / 720.0f;
  sum = sum * r + 1.0f / 120.0f;
  sum = sum * r + 1.0f / 24.0f;
  sum = sum * r + 1.0f / 6.0f;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const float power_of_two = bits_float((float_bits(shifted) - float_bits(kShift) + 127u) << 23);
  return overflows ? bits_float(0x7f800000u) : sum * power_of_two;
}

USAF_HD float sigmoid(float x) { return 1.0f / (1.0f + exp_normal(-x)); }

// h = gate * up after the activation, with the partial derivatives of h.
struct GatedValue {
  float h, d_gate, d_up;
};

struct Silu {
  USAF_HD static GatedValue apply(float gate, float up) {
    const float s = sigmoid(gate);
    const float value = gate * s;
    return {value * up, (s + value * (1.0f - s)) * up, value};
  }
};

struct GeluTanh {
  USAF_HD static GatedValue apply(float gate, float up) {
    constexpr float kTwoSqrt2OverPi = 1.59576912f;
    constexpr float kCubic = 0.044715f;
    // The sigmoid is 0 or 1 to fp32 from |gate| = 6 on; the bound keeps the cube from overflowing.
    float bounded = gate < -16.0f ? -16.0f : gate;
    bounded = bounded > 16.0f ? 16.0f : bounded;
    const float square = bounded * bounded;
    const float s = sigmoid(kTwoSqrt2OverPi * (bounded + kCubic * bounded * square));
    const float value = gate * s;
    const float slope = kTwoSqrt2OverPi * (1.0f + 3.0f * kCubic * square);
    return {value * up, (s + bounded * s * (1.0f - s) * slope) * up, value};
  }
};

struct SwigluClamped {
  USAF_HD static GatedValue apply(float gate, float up) {
    const float c = gate > kClampedLimit ? kClampedLimit : gate;
    float d = up > kClampedLimit ? kClampedLimit : up;
    d = d < -kClampedLimit ? -kClampedLimit : d;
    const float s = sigmoid(kClampedAlpha * c);
    const float value = c * s;
    const float slope = s + kClampedAlpha * (value * (1.0f - s));
    return {value * (d + 1.0f), gate > kClampedLimit ? 0.0f : slope * (d + 1.0f), d == up ? value : 0.0f};
  }
};

}  // namespace usaf

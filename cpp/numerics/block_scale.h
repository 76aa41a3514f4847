// What the scales of all block formats share. A block's absmax is its largest magnitude; a format makes of it the scale
// that it stores and the step: a code stands for its value times the step. Weights are divided by the step as
// w * inverse_step(step), so that a block of zeros divides by kMinStep and not by 0.
#pragma once
#include <cstdint>

#include "float_bits.h"
#include "host_device.h"

namespace usaf {

inline constexpr float kMinStep = 1e-38f;

// |w| as ordered bits: the largest one of a block is its absmax (NaN above infinity above every number).
USAF_HD uint32_t magnitude_bits(float weight) { return float_bits(weight) & 0x7fffffffu; }

USAF_HD float inverse_step(float step) { return 1.0f / (step > kMinStep ? step : kMinStep); }

}  // namespace usaf

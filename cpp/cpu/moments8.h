// Block-wise 8-bit moments (numerics/dynamic8.h) of one block of a row.
#pragma once
#include <cstdint>

#include "../numerics/dynamic8.h"

namespace usaf::cpu {

// `count` <= kMomentBlock.
void decode_moments(const Dynamic8& map, const uint8_t* codes, float absmax, int64_t count, float* out);
// Returns the absmax.
float encode_moments(const Dynamic8& map, const float* moments, int64_t count, uint8_t* codes);

}  // namespace usaf::cpu

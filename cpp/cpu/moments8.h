// Block-wise 8-bit moments (numerics/dynamic8.h) of one block of a row.
#pragma once
#include <cstdint>

#include "../numerics/dynamic8.h"

namespace usaf::cpu {

// count <= kMomentBlock. is_signed: exp_avg's map, else exp_avg_sq's.
void decode_moments(bool is_signed, const uint8_t* codes, float absmax, int64_t count, float* out);
// Returns the absmax.
float encode_moments(bool is_signed, const float* moments, int64_t count, uint8_t* codes);

}  // namespace usaf::cpu

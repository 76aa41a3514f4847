// Test-only: what GPU kernels take of cpp/numerics and cpp/gpu and the CPU backend does not, for ctypes.
#include "gpu/masked_adam_launch.h"
#include "numerics/bfloat16.h"
#include "numerics/dynamic8.h"
#include "numerics/nf4.h"

using namespace usaf;

extern "C" {

// `map`: 0 exp_avg's, 1 exp_avg_sq's, 2 NF4. The codes by bisection, and by the lookup.
void codes_of(int64_t map, const float* values, int64_t count, uint8_t* plain, uint8_t* by_lookup) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = values[i];
    const uint32_t codes[2] = {map == 0   ? dynamic8_encode(kDynamic8Signed, x)
                               : map == 1 ? dynamic8_encode(kDynamic8Unsigned, x)
                                          : nf4_encode(x),
                               map == 0   ? dynamic8_encode(kDynamic8SignedLookup, x)
                               : map == 1 ? dynamic8_encode(kDynamic8UnsignedLookup, x)
                                          : nf4_encode(kNf4Lookup64, x)};
    plain[i] = static_cast<uint8_t>(codes[0]), by_lookup[i] = static_cast<uint8_t>(codes[1]);
  }
}

void to_pairs(const float (*values)[8], int64_t count, uint32_t (*pairs)[4]) {
  for (int64_t i = 0; i < count; ++i) to_bf16_pairs(values[i], pairs[i]);
}

int64_t adam_groups(int64_t num_rows, int64_t resident, int64_t max_rows) {
  return gpu::adam_groups(num_rows, resident, max_rows, int64_t{1} << 31);
}

}  // extern "C"

// Counter-based random numbers: a pure function of (seed, step, element), so rounding noise does not depend on the
// launch shape, the number of threads or the backend, and a rerun gives the same bits.
//
// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC11). The key is the
// seed; the counter is (group low, group high, step, 0) where one call serves the four elements of a group.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace usaf {

struct Random4 {
  uint32_t value[4];
};

inline constexpr int kRandomsPerGroup = 4;
inline constexpr int kPhiloxRounds = 10;
inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;  // added to the key each round

USAF_HD Random4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * c0;
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxKey0;
    k1 += kPhiloxKey1;
  }
  return Random4{{c0, c1, c2, c3}};
}

// The numbers of elements 4 * group .. 4 * group + 3.
USAF_HD Random4 random_group(uint64_t seed, int32_t step, uint64_t group) {
  return philox4x32(static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), static_cast<uint32_t>(step), 0u,
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// The numbers of one group of a layer's router noise. The last counter word is never 0, so that the stream is disjoint
// from random_group's under the same seed. micro_batch in [0, 2^31).
USAF_HD Random4 router_random_group(uint64_t seed, int32_t step, int32_t micro_batch, int32_t layer, uint32_t group) {
  return philox4x32(group, static_cast<uint32_t>(layer), static_cast<uint32_t>(step),
                    static_cast<uint32_t>(micro_batch) + 1u, static_cast<uint32_t>(seed),
                    static_cast<uint32_t>(seed >> 32));
}

// 24 random bits as a float in [0, 1).
USAF_HD float to_uniform(uint32_t random) {
  return static_cast<float>(static_cast<int32_t>(random >> 8)) * (1.0f / 16777216.0f);
}

// 23 random bits as the middle of their interval: a float in [2^-24, 1 - 2^-24], whose logarithm is finite and not 0.
USAF_HD float to_open_uniform(uint32_t random) {
  return (static_cast<float>(static_cast<int32_t>(random >> 9)) + 0.5f) * (1.0f / 8388608.0f);
}

}  // namespace usaf

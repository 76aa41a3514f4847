// fp32 as its 32 bits, and the two conversions that every 16-bit type defines for itself: to_float and from_float.
#pragma once
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace usaf {

USAF_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

USAF_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

USAF_HD float to_float(float value) { return value; }

template <class T>
USAF_HD T from_float(float value);
template <>
USAF_HD float from_float<float>(float value) {
  return value;
}

}  // namespace usaf

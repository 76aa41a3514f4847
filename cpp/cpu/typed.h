// From a run-time DType to a C++ type.
#pragma once
#include <cstdint>

#include "../kernel_api.h"
#include "../numerics/bfloat16.h"

namespace usaf::cpu {

// body(T{}) with T = float or Bf16.
template <class Body>
void with_type(DType dtype, const Body& body) {
  if (dtype == DType::f32) {
    body(float{});
  } else {
    body(Bf16{});
  }
}

inline float load(const void* data, DType dtype, int64_t index) {
  return dtype == DType::f32 ? static_cast<const float*>(data)[index] : to_float(static_cast<const Bf16*>(data)[index]);
}

inline void store(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<Bf16*>(data)[index] = to_bf16(value);
  }
}

}  // namespace usaf::cpu

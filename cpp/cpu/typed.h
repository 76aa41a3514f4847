// From a run-time DType to a C++ type.
#pragma once
#include <cstdint>

#include "../kernel_api.h"
#include "../numerics/bfloat16.h"
#include "../numerics/float16.h"

namespace usaf::cpu {

// body(T{}) with T = float, Bf16 or F16.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(Bf16{});
    case DType::f16:
      return body(F16{});
  }
}

inline float load(const void* data, DType dtype, int64_t index) {
  float value = 0.0f;
  with_type(dtype, [&]<class T>(T) { value = to_float(static_cast<const T*>(data)[index]); });
  return value;
}

inline void store(void* data, DType dtype, int64_t index, float value) {
  with_type(dtype, [&]<class T>(T) { static_cast<T*>(data)[index] = from_float<T>(value); });
}

}  // namespace usaf::cpu

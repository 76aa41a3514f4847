// Which addresses the GPU kernels may access in one piece.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "../numerics/formats.h"

namespace usaf::gpu {

inline bool is_multiple(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

inline void check_codes(const uint8_t* codes) {
  if (!is_multiple(codes, kRowAlign)) {
    throw std::invalid_argument("codes: expected an address that is a multiple of 16");
  }
}

}  // namespace usaf::gpu

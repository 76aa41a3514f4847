// Stores past the caches, for results too large to stay in them: a normal store reads the line first, for nothing. What
// fits the caches is stored normally, since whoever comes next will read it there.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace usaf::cpu {

inline constexpr int64_t kStreamBytes = int64_t{16} << 20;  // a result from this size on
inline constexpr int64_t kStreamAlign = 64;

// Whether rows of `cols` elements, `stride` apart, may be written so.
inline bool may_stream(const void* out, int64_t num_rows, int64_t cols, int64_t stride, int64_t element_bytes) {
  return num_rows * cols * element_bytes >= kStreamBytes && reinterpret_cast<uintptr_t>(out) % kStreamAlign == 0 &&
         stride * element_bytes % kStreamAlign == 0;
}

// `bytes` is a multiple of kStreamAlign, and `to` is aligned to it.
inline void stream_copy(const void* from, int64_t bytes, void* to) {
#if defined(__x86_64__)
  for (int64_t i = 0; i < bytes; i += 16) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<char*>(to) + i), part);
  }
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

// A thread's streamed stores come before whatever it stores next.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace usaf::cpu

#include "brgemm.h"

#include <algorithm>

#include "../cpu/panel.h"

#if defined(__x86_64__) && __has_include(<ATen/native/CPUBlas.h>)
#include <ATen/native/CPUBlas.h>
#endif

namespace usaf {

#ifdef CPUBLAS_BRGEMM_BF16BF16F32

namespace {

// torch compiles a kernel for every number of rows it meets: at most this many.
constexpr int64_t kMaxRows = 64;

bool gives_the_right_product() {
  constexpr int64_t kRows = 3, kDepth = 64;
  Bf16 a[kRows * kDepth], panel[kDepth * cpu::kPanelColumns];
  const auto a_value = [](int64_t row, int64_t k) { return static_cast<float>((3 * row + k) % 7 - 3); };
  const auto b_value = [](int64_t k, int64_t c) { return static_cast<float>((5 * k + c) % 9 - 4); };
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t k = 0; k < kDepth; ++k) a[row * kDepth + k] = to_bf16(a_value(row, k));
  }
  for (int64_t k = 0; k < kDepth; ++k) {
    for (int64_t c = 0; c < cpu::kPanelColumns; ++c) {
      panel[k / 2 * 2 * cpu::kPanelColumns + 2 * c + k % 2] = to_bf16(b_value(k, c));
    }
  }
  float product[kRows * cpu::kPanelColumns];
  try {
    brgemm(a, kDepth, kRows, kDepth, panel, product, cpu::kPanelColumns, false);
    brgemm(a, kDepth, kRows, kDepth, panel, product, cpu::kPanelColumns, true);
    brgemm_release();
  } catch (const std::exception&) {
    return false;
  }
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t c = 0; c < cpu::kPanelColumns; ++c) {
      float expected = 0.0f;  // small integers: exact in any order
      for (int64_t k = 0; k < kDepth; ++k) expected += 2.0f * a_value(row, k) * b_value(k, c);
      if (product[row * cpu::kPanelColumns + c] != expected) return false;
    }
  }
  return true;
}

}  // namespace

bool brgemm_available() {
  static const bool available = __builtin_cpu_supports("avx512bf16") && gives_the_right_product();
  return available;
}

void brgemm(const Bf16* a, int64_t a_stride, int64_t num_rows, int64_t depth, const Bf16* panel, float* c,
            int64_t c_stride, bool add) {
  for (int64_t row = 0; row < num_rows; row += kMaxRows) {
    at::native::cpublas::brgemm(std::min(kMaxRows, num_rows - row), cpu::kPanelColumns, depth, a_stride,
                                cpu::kPanelColumns, c_stride, add,
                                reinterpret_cast<const at::BFloat16*>(a + row * a_stride),
                                reinterpret_cast<const at::BFloat16*>(panel), c + row * c_stride, /*is_vnni=*/true);
  }
}

void brgemm_release() { at::native::cpublas::brgemm_release(); }

#else

bool brgemm_available() { return false; }
void brgemm(const Bf16*, int64_t, int64_t, int64_t, const Bf16*, float*, int64_t, bool) {}
void brgemm_release() {}

#endif

}  // namespace usaf

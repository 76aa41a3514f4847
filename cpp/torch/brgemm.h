// torch's own small GEMM on packed bf16 panels, where this torch and this CPU have it. Its header is no promised API:
// without it, or where it does not give the right product, the callers take at::mm.
#pragma once
#include <cstdint>

#include "../numerics/bfloat16.h"

namespace usaf {

// Compiled in, on a CPU with AVX512_BF16, and right on a small example (tried once).
bool brgemm_available();

// C [num_rows, 64] = A [num_rows, depth] * panel (cpu/panel.h), or += with `add`, in fp32. `depth` is even; strides in
// elements. The bits of a row do not depend on the other rows.
void brgemm(const Bf16* a, int64_t a_stride, int64_t num_rows, int64_t depth, const Bf16* panel, float* c,
            int64_t c_stride, bool add);

// After the last call in a thread: gives the CPU's tile registers back.
void brgemm_release();

}  // namespace usaf

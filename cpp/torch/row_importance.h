// row_importance on the CPU by the fastest way this CPU and this torch have.
#pragma once
#include "../kernel_api.h"

namespace usaf {

// cpu::row_importance, or for bf16 where brgemm is available the same through GEMMs: equal to rounding.
void row_importance(const RowImportanceArgs& args, void* stream);

}  // namespace usaf

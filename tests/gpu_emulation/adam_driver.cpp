// Test-only: masked Adam's launcher for ctypes.
#include "guarded.h"
#include "kernel_api.h"

extern "C" {

int masked_adam(const usaf::MaskedAdamArgs* args, void* stream) {
  return guarded([&] { usaf::gpu::masked_adam(*args, stream); });
}
size_t masked_adam_args_size() { return sizeof(usaf::MaskedAdamArgs); }

}  // extern "C"

// Test-only: launchers by name, each with its argument struct, for ctypes. Linked with the
// emulator and with the sources of cuda/ or of hip/ that define them.
#include <functional>
#include <map>
#include <stdexcept>

#include "guarded.h"
#include "kernel_api.h"

namespace {

using Launch = std::function<void(const void* args, void* stream)>;

template <class Args>
Launch typed(void (*launcher)(const Args&, void*)) {
  return [launcher](const void* args, void* stream) { launcher(*static_cast<const Args*>(args), stream); };
}

const std::map<std::string, Launch> launchers = {
    {"sort_by_expert", typed(usaf::gpu::sort_by_expert)},
    {"gather_rows", typed(usaf::gpu::gather_rows)},
    {"permute_rows", typed(usaf::gpu::permute_rows)},
    {"combine_rows", typed(usaf::gpu::combine_rows)},
    {"combine_rows_backward", typed(usaf::gpu::combine_rows_backward)},
    {"scatter_add_rows", typed(usaf::gpu::scatter_add_rows)},
    {"glu", typed(usaf::gpu::glu)},
    {"glu_backward", typed(usaf::gpu::glu_backward)},
    {"row_gradient", typed(usaf::gpu::row_gradient)},
    {"row_importance", typed(usaf::gpu::row_importance)},
    {"squares_of_rows", typed(usaf::gpu::squares_of_rows)},
    {"router_uniform", typed(usaf::gpu::router_uniform)},
    {"decode_residual", typed(usaf::gpu::decode_residual)},
    {"encode_residual", typed(usaf::gpu::encode_residual)},
    {"decode_moments8", typed(usaf::gpu::decode_moments8)},
};

}  // namespace

extern "C" int run_launcher(const char* name, const void* args, void* stream) {
  return guarded([&] { launchers.at(name)(args, stream); });
}

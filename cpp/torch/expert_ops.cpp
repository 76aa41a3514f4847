// usaf::experts_forward, usaf::experts_backward: one MoE layer's experts in one call; and their _many forms, for
// several micro-batches in one sweep of the layer's pages.
//
// Experts run in ascending order, each decoded once, and for each expert the micro-batches in ascending order, each
// with its own GEMMs; they add to fp32 outputs in that order. So the bits do not depend on the budget, on what is
// resident or on the order in which pages arrive, and M micro-batches in one call give the bits of M calls.
#include "expert_ops.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <utility>

#include "backend.h"
#include "gpu_device_type.h"

namespace usaf {
namespace {

using at::Tensor;

Tensor experts_forward(const Tensor& x, const Tensor& index, const Tensor& weights, const Tensor& /*anchor*/,
                       int64_t handle, bool training) {
  return std::move(experts_forward_many(x, index, weights, handle, training)[0]);
}

std::tuple<Tensor, Tensor, Tensor> experts_backward(const Tensor& grad_out, const Tensor& x, const Tensor& index,
                                                    const Tensor& weights, int64_t handle) {
  auto [grad_x, grad_weights, grad_anchor] = experts_backward_many(grad_out, x, index, weights, handle);
  return {std::move(grad_x[0]), std::move(grad_weights[0]), std::move(grad_anchor)};
}

void register_experts(torch::Library& m) {
  m.impl("experts_forward", &experts_forward);
  m.impl("experts_backward", &experts_backward);
  m.impl("experts_forward_many", &experts_forward_many);
  m.impl("experts_backward_many", &experts_backward_many);
}

}  // namespace

// The host steers the pager: a graph that is captured must not run over these ops.
TORCH_LIBRARY_FRAGMENT(usaf, m) {
  const std::vector<at::Tag> tags{at::Tag::cudagraph_unsafe};
  m.def("experts_forward(Tensor x, Tensor index, Tensor weights, Tensor anchor, int handle, bool training) -> Tensor",
        tags);
  m.def(
      "experts_backward(Tensor grad_out, Tensor x, Tensor index, Tensor weights, int handle) -> "
      "(Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "experts_forward_many(Tensor[] x, Tensor[] index, Tensor[] weights, int handle, bool training) -> "
      "Tensor[]",
      tags);
  m.def(
      "experts_backward_many(Tensor[] grad_out, Tensor[] x, Tensor[] index, Tensor[] weights, int handle) -> "
      "(Tensor[] grad_x, Tensor[] grad_weights, Tensor grad_anchor)",
      tags);
}

TORCH_LIBRARY_IMPL(usaf, CPU, m) { register_experts(m); }
#ifdef USAF_WITH_GPU
TORCH_LIBRARY_IMPL(usaf, USAF_GPU_KEY, m) { register_experts(m); }

std::string gpu_device_type() {
  return c10::DeviceTypeName(c10::dispatchKeyToDeviceType(c10::DispatchKey::USAF_GPU_KEY), /*lower_case=*/true);
}
#endif

// No second derivative; and the caller of the many-forms builds its own graph.
TORCH_LIBRARY_IMPL(usaf, Autograd, m) {
  for (const char* name : {"experts_backward", "experts_forward_many", "experts_backward_many"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace usaf

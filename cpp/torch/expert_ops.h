// The bodies of the expert layer's ops, for M micro-batches in one sweep of the layer's pages.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace usaf {

std::vector<at::Tensor> experts_forward_many(at::TensorList x, at::TensorList index, at::TensorList weights,
                                             int64_t handle, bool training);

// grad_x and grad_weights per micro-batch, and grad_anchor.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor> experts_backward_many(
    at::TensorList grad_out, at::TensorList x, at::TensorList index, at::TensorList weights, int64_t handle);

}  // namespace usaf

// Test-only: tensors of the fake GPU seen as CPU tensors over the same memory, for the length of one op.
#pragma once
#include <ATen/core/Tensor.h>

#include <unordered_map>
#include <utility>
#include <vector>

namespace fake_gpu {

class HostViews {
 public:
  // A CPU tensor over the same memory; one storage for all that share one.
  at::Tensor to_host(const at::Tensor& device);
  // The device tensor that a result is or, if it is a view of one or new, becomes.
  at::Tensor to_device(const at::Tensor& host);
  // Gives the device tensors the sizes and memory that the op gave to their views.
  void write_back();

 private:
  c10::Storage host_storage(const c10::Storage& device);

  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;             // device, host
  std::unordered_map<c10::StorageImpl*, c10::Storage> host_, device_;  // by the storage on the other side
  std::vector<std::pair<c10::Storage, const void*>> addresses_;        // host storages, where they were
};

}  // namespace fake_gpu

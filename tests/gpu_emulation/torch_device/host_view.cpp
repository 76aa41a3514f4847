#include "host_view.h"

#include <c10/core/CPUAllocator.h>

#include "memory.h"

namespace fake_gpu {
namespace {

void release_storage(void* context) { delete static_cast<c10::Storage*>(context); }

at::Tensor make_tensor(const c10::Storage& storage, c10::DispatchKey key, const at::Tensor& like) {
  at::Tensor tensor =
      at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

}  // namespace

c10::Storage HostViews::host_storage(const c10::Storage& device) {
  c10::Storage& host = host_[device.unsafeGetStorageImpl()];
  if (!host) {
    c10::DataPtr memory(device.mutable_data(), new c10::Storage(device), &release_storage, c10::Device(c10::kCPU));
    host = c10::Storage(c10::Storage::use_byte_size_t{}, device.nbytes(), std::move(memory), c10::GetCPUAllocator(),
                        device.resizable());
    device_.emplace(host.unsafeGetStorageImpl(), device);
    addresses_.emplace_back(host, host.data());
  }
  return host;
}

at::Tensor HostViews::to_host(const at::Tensor& device) {
  for (const auto& [known, host] : tensors_) {
    if (known.is_same(device)) return host;
  }
  at::Tensor host = make_tensor(host_storage(device.storage()), c10::DispatchKey::CPU, device);
  if (device.unsafeGetTensorImpl()->is_wrapped_number()) host.unsafeGetTensorImpl()->set_wrapped_number(true);
  tensors_.emplace_back(device, host);
  return host;
}

at::Tensor HostViews::to_device(const at::Tensor& host) {
  if (!host.defined()) return host;
  for (const auto& [device, known] : tensors_) {
    if (known.is_same(host)) return device;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(host.is_cpu() && host.layout() == at::kStrided, "the fake GPU has dense tensors only");
  c10::Storage& storage = device_[host.storage().unsafeGetStorageImpl()];
  if (!storage) {
    storage = c10::Storage(c10::Storage::use_byte_size_t{}, host.storage().nbytes(), adopt(host.storage()),
                           device_allocator(), true);
  }
  return make_tensor(storage, c10::DispatchKey::PrivateUse1, host);
}

void HostViews::write_back() {
  for (const auto& [host, address] : addresses_) {
    if (host.data() == address) continue;
    c10::Storage& device = device_[host.unsafeGetStorageImpl()];
    device.set_data_ptr(adopt(host));
    device.set_nbytes(host.nbytes());
  }
  for (const auto& [device, host] : tensors_) {
    TORCH_INTERNAL_ASSERT(device_[host.storage().unsafeGetStorageImpl()].is_alias_of(device.storage()));
    if (device.sizes() == host.sizes() && device.strides() == host.strides()) continue;
    device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }
}

}  // namespace fake_gpu

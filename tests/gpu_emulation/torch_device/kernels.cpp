// Test-only: torch's ops on the fake GPU. Those that make memory or views of it are registered one by one; all others
// run torch's CPU kernel on host views of their tensors. Tensors of other devices are refused as a GPU refuses them.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/Tensor.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <mutex>
#include <optional>
#include <string>

#include "../emulator.h"
#include "host_view.h"
#include "memory.h"
#include "random.h"

namespace fake_gpu {
namespace {

using at::Tensor;
using c10::IValue;

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool> pin_memory, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(size, device_allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKeys, c10::dtype_or_default(dtype));
}

Tensor& set_nothing(Tensor& self) {
  const c10::Storage storage(c10::Storage::use_byte_size_t{}, 0, device_allocator(), true);
  return at::native::set_storage_cpu_(self, storage, 0, {0}, {});
}

// Between the device and the host, or within the device.
Tensor copy_from(const Tensor& self, const Tensor& destination, bool) {
  HostViews views;
  const auto host = [&](const Tensor& tensor) { return tensor.is_cpu() ? tensor : views.to_host(tensor); };
  host(destination).copy_(host(self));
  return destination;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& destination) {
  destination.resize_(self.sizes());
  return copy_from(self, destination, false);
}

// SDPBackend::math: the fused CPU kernel is called by its own op, which a GPU does not have.
int64_t fused_sdp_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                         std::optional<double>, bool) {
  return 0;
}

// The CPU's kernel takes floats only, a GPU's integers too.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& min, const at::Scalar& max) {
  HostViews views;
  return views.to_device(at::histc(views.to_host(self).to(at::kDouble), bins, min, max).to(self.scalar_type()));
}

void record_stream(Tensor&, c10::Stream) {}

// Arguments that a GPU takes from the CPU too: the lists of indices of x[i, j].
bool takes_host_tensors(const std::string& op, const c10::Argument& argument) {
  return argument.name() == "indices" &&
         (op == "aten::index" || op == "aten::index_put_" || op == "aten::_index_put_impl_");
}

class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : schema_(op.schema()) {}

  IValue host_argument(const IValue& value, const c10::Argument& argument) {
    if (value.isTensor()) return host_tensor(value.toTensor(), argument);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(host_tensor(tensor, argument));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::optional(host_tensor(*tensor, argument)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().is_privateuseone()) return c10::Device(c10::kCPU);
    if (value.isGenerator()) return inner_generator(value.toGenerator());
    if (value.isNone() && *argument.type() == *c10::OptionalType::create(c10::GeneratorType::get())) {
      return inner_generator(default_generator());
    }
    return value;
  }

  IValue device_result(const IValue& value) {
    if (value.isTensor()) return views_.to_device(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(views_.to_device(tensor));
    return list;
  }

  void write_back() { views_.write_back(); }

 private:
  Tensor host_tensor(const Tensor& tensor, const c10::Argument& argument) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_privateuseone()) return views_.to_host(tensor);
    TORCH_CHECK(tensor.is_cpu() && (tensor.dim() == 0 || takes_host_tensors(schema_.name(), argument)),
                "Expected all tensors to be on the same device, but ", schema_.name(), " got ", argument.name(), " on ",
                tensor.device(), " and other tensors on ", kDevice);
    return tensor;
  }

  const c10::FunctionSchema& schema_;
  HostViews views_;
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  // Never for others' ops: one without a kernel for GPUs has to say so.
  TORCH_CHECK_NOT_IMPLEMENTED(schema.getNamespace() == "aten", "Could not run '", op.operator_name(),
                              "' with arguments from the '", kDevice.type(), "' backend");
  Call call(op);
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    IValue& value = (*stack)[stack->size() - arguments.size() + i];
    value = call.host_argument(value, schema.arguments()[i]);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.write_back();
  const size_t num_results = schema.returns().size();
  for (size_t i = stack->size() - num_results; i < stack->size(); ++i) (*stack)[i] = call.device_result((*stack)[i]);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_", &set_nothing);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_fused_sdp_choice", &fused_sdp_choice);
  m.impl("histc", &histc);
  m.impl("record_stream", &record_stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

// What torch's own set_data does for the device types it knows.
void set_data(const Tensor& self, const Tensor& value) {
  self.unsafeGetTensorImpl()->shallow_copy_from(value.getIntrusivePtr());
  if (auto* meta = torch::autograd::impl::get_autograd_meta(self)) {
    const std::lock_guard lock(meta->mutex_);
    meta->grad_accumulator_.reset();  // it knows the device that the tensor had
  }
}

}  // namespace

// For fake_gpu.py and the tests.
TORCH_LIBRARY(fake_gpu, m) {
  m.def("manual_seed(int seed) -> ()", [](int64_t seed) {
    default_generator().unsafeGetGeneratorImpl()->set_current_seed(static_cast<uint64_t>(seed));
  });
  m.def("get_rng_state() -> Tensor", [] { return default_generator().get_state(); });
  m.def("set_rng_state(Tensor state) -> ()", [](const Tensor& state) {
    default_generator().unsafeGetGeneratorImpl()->set_state(*state.unsafeGetTensorImpl());
  });
  m.def("set_data(Tensor(a!) self, Tensor value) -> ()", &set_data);
  m.def("num_launches() -> int", [] { return emulator::control().launches; });
  m.def("last_stream() -> int", [] { return reinterpret_cast<int64_t>(emulator::control().last_stream); });
}

}  // namespace fake_gpu

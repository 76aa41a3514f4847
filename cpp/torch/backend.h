// A backend as the adapters see it: its launchers and the stream they run on. One adapter, a template over these,
// serves every dispatch key.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "../kernel_api.h"
#include "row_importance.h"

namespace usaf {

struct CpuBackend {
  static constexpr bool kHostMemory = true;  // the adapters can look at values: indices are range-checked
  static constexpr auto encode_rows = cpu::encode_rows;
  static constexpr auto decode_rows = cpu::decode_rows;
  static constexpr auto sort_by_expert = cpu::sort_by_expert;
  static constexpr auto permute_rows = cpu::permute_rows;
  static constexpr auto combine_rows = cpu::combine_rows;
  static constexpr auto combine_rows_backward = cpu::combine_rows_backward;
  static constexpr auto glu = cpu::glu;
  static constexpr auto glu_backward = cpu::glu_backward;
  static constexpr auto row_gradient = cpu::row_gradient;
  static constexpr auto row_importance = usaf::row_importance;
  static constexpr auto masked_adam = cpu::masked_adam;
  static constexpr auto router_uniform = cpu::router_uniform;
  static constexpr auto decode_residual = cpu::decode_residual;
  static constexpr auto encode_residual = cpu::encode_residual;
  static constexpr auto decode_moments8 = cpu::decode_moments8;

  // Makes the tensor's device current for its lifetime; stream() is that device's current stream.
  struct Guard {
    explicit Guard(const at::Tensor&) {}
    void* stream() const { return nullptr; }
  };
};

#ifdef USAF_WITH_GPU
// CUDA and ROCm alike: both register under torch's CUDA key. c10's guard registry gives the stream without their
// headers.
#ifndef USAF_GPU_KEY
#define USAF_GPU_KEY CUDA  // the emulated build of tests/gpu_emulation has a device of its own
#endif
struct GpuBackend {
  static constexpr bool kHostMemory = false;
  static constexpr auto encode_rows = gpu::encode_rows;
  static constexpr auto decode_rows = gpu::decode_rows;
  static constexpr auto masked_adam = gpu::masked_adam;
  static constexpr auto sort_by_expert = gpu::sort_by_expert;
  static constexpr auto permute_rows = gpu::permute_rows;
  static constexpr auto combine_rows = gpu::combine_rows;
  static constexpr auto combine_rows_backward = gpu::combine_rows_backward;
  static constexpr auto glu = gpu::glu;
  static constexpr auto glu_backward = gpu::glu_backward;
  static constexpr auto row_gradient = gpu::row_gradient;
  static constexpr auto row_importance = gpu::row_importance;
  static constexpr auto router_uniform = gpu::router_uniform;
  static constexpr auto decode_residual = gpu::decode_residual;
  static constexpr auto encode_residual = gpu::encode_residual;
  static constexpr auto decode_moments8 = gpu::decode_moments8;

  class Guard {
   public:
    explicit Guard(const at::Tensor& tensor) : device_(tensor.device()), guard_(tensor.device()) {}
    void* stream() const { return c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).native_handle(); }

   private:
    c10::Device device_;
    c10::OptionalDeviceGuard guard_;
  };
};
#endif

}  // namespace usaf

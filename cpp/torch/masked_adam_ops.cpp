// masked_adam_.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "backend.h"
#include "checks.h"

namespace usaf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_scalars(double lr, double beta1, double beta2, double eps, double weight_decay, int64_t first_element) {
  TORCH_CHECK_VALUE(std::isfinite(lr) && lr >= 0, "lr: expected a finite number of at least 0, got ", lr);
  TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1, "beta1: expected 0 <= beta1 < 1, got ", beta1);
  TORCH_CHECK_VALUE(beta2 >= 0 && beta2 < 1, "beta2: expected 0 <= beta2 < 1, got ", beta2);
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, "eps: expected a finite number of at least 0, got ", eps);
  TORCH_CHECK_VALUE(std::isfinite(weight_decay) && weight_decay >= 0,
                    "weight_decay: expected a finite number of at least 0, got ", weight_decay);
  TORCH_CHECK_VALUE(first_element >= 0, "first_element: expected at least 0, got ", first_element);
}

// A single number on the device, so that the host need not wait for it.
void check_single(const OptionalTensor& tensor, const char* name, at::ScalarType dtype, const Tensor& reference) {
  if (!tensor.has_value()) return;
  check_dtype(*tensor, name, dtype);
  TORCH_CHECK_VALUE(tensor->numel() == 1, name, ": expected one element, got shape ", tensor->sizes());
  check_device(*tensor, name, reference);
}

template <class T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

template <class Backend>
void masked_adam_(const Tensor& codes, const Tensor& absmax, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                  const Tensor& step, const Tensor& grad_in, std::string_view format_name, std::string_view mode_name,
                  double lr, double beta1, double beta2, double eps, double weight_decay, const OptionalTensor& master,
                  const OptionalTensor& active_in, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                  const OptionalTensor& changed, int64_t seed, int64_t first_element) {
  const Format format = check_format(format_name);
  const AdamMode mode = checked(parse_adam_mode, mode_name);
  check_scalars(lr, beta1, beta2, eps, weight_decay, first_element);
  check_dtype(grad_in, "grad", at::kFloat);
  TORCH_CHECK_VALUE(grad_in.dim() >= 2, "grad: expected shape [rows.., cols], got ", grad_in.sizes());
  const at::IntArrayRef rows = grad_in.sizes().slice(0, grad_in.dim() - 1);
  const int64_t cols = grad_in.size(-1);
  check_writable(codes, "codes", at::kByte, with_last(rows, code_bytes(format, cols)));
  check_writable(absmax, "absmax", scale_type(format), with_last(rows, num_blocks(format, cols)));
  check_writable(exp_avg, "exp_avg", at::kFloat, grad_in.sizes());
  check_writable(exp_avg_sq, "exp_avg_sq", at::kFloat, grad_in.sizes());
  check_writable(step, "step", at::kInt, rows);
  for (const auto& [tensor, name] :
       {std::pair(&absmax, "absmax"), std::pair(&exp_avg, "exp_avg"), std::pair(&exp_avg_sq, "exp_avg_sq"),
        std::pair(&step, "step"), std::pair(&grad_in, "grad")}) {
    check_device(*tensor, name, codes);
  }
  TORCH_CHECK_VALUE(master.has_value() == (mode == AdamMode::master), "master: expected ",
                    mode == AdamMode::master ? "a tensor in mode 'master', got None" : "None in mode 'in_place'");
  DType master_dtype = DType::f32;
  if (master.has_value()) {
    master_dtype = check_float(*master, "master");
    TORCH_CHECK_TYPE(master_dtype != DType::f16, "master: expected Float or BFloat16, got Half");
    check_writable(*master, "master", master->scalar_type(), grad_in.sizes());
    check_device(*master, "master", codes);
  }
  if (active_in.has_value()) {
    check_dtype(*active_in, "active", at::kBool);
    check_shape(*active_in, "active", rows);
    check_device(*active_in, "active", codes);
  }
  check_single(grad_scale, "grad_scale", at::kFloat, codes);
  check_single(found_inf, "found_inf", at::kFloat, codes);
  check_single(changed, "changed", at::kInt, codes);
  if constexpr (Backend::kHostMemory) check_range<int32_t>(step, "step", 0, INT32_MAX);

  const typename Backend::Guard guard(codes);
  const Tensor grad = grad_in.contiguous();
  const OptionalTensor active = active_in.has_value() ? OptionalTensor(active_in->contiguous()) : std::nullopt;
  Backend::masked_adam({codes.mutable_data_ptr<uint8_t>(),
                        absmax.mutable_data_ptr(),
                        master.has_value() ? master->mutable_data_ptr() : nullptr,
                        exp_avg.mutable_data_ptr<float>(),
                        exp_avg_sq.mutable_data_ptr<float>(),
                        step.mutable_data_ptr<int32_t>(),
                        grad.const_data_ptr<float>(),
                        data_or_null<bool>(active),
                        data_or_null<float>(grad_scale),
                        data_or_null<float>(found_inf),
                        changed.has_value() ? changed->mutable_data_ptr<int32_t>() : nullptr,
                        c10::multiply_integers(rows),
                        cols,
                        lr,
                        beta1,
                        beta2,
                        eps,
                        weight_decay,
                        static_cast<uint64_t>(seed),
                        first_element,
                        format,
                        mode,
                        master_dtype},
                       guard.stream());
}

}  // namespace

TORCH_LIBRARY_IMPL(usaf, CPU, m) { m.impl("masked_adam_", &masked_adam_<CpuBackend>); }

}  // namespace usaf

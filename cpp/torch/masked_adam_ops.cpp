// masked_adam_ and dequantize_moments8.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "../numerics/dynamic8.h"
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

DType check_f32_or_bf16(const Tensor& tensor, const char* name) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16, name, ": expected Float or BFloat16, got ", type);
  return type == at::kFloat ? DType::f32 : DType::bf16;
}

template <class T>
T* mutable_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->mutable_data_ptr<T>() : nullptr;
}

// A moment: fp32, or 8-bit codes with their absmax.
void check_moment(const Tensor& moment, const char* name, const OptionalTensor& absmax, const char* absmax_name,
                  at::IntArrayRef shape, const Tensor& codes) {
  if (absmax.has_value()) {
    check_writable(moment, name, at::kByte, shape);
    check_writable(*absmax, absmax_name, at::kFloat,
                   with_last(shape.slice(0, shape.size() - 1), num_moment_blocks(shape.back())));
    check_device(*absmax, absmax_name, codes);
  } else {
    TORCH_CHECK_VALUE(moment.scalar_type() != at::kByte, absmax_name, ": expected a tensor for 8-bit ", name,
                      ", got None");
    check_writable(moment, name, at::kFloat, shape);
  }
  check_device(moment, name, codes);
}

// A tensor that one mode needs and the others refuse.
void check_mode_state(const OptionalTensor& tensor, const char* name, bool expected, std::string_view mode) {
  TORCH_CHECK_VALUE(tensor.has_value() == expected, name, ": expected ",
                    expected ? "a tensor in mode '" : "None in mode '", mode, "', got ",
                    expected ? "None" : "a tensor");
}

template <class Backend>
void masked_adam_(const Tensor& codes, const Tensor& absmax, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                  const Tensor& step, const Tensor& grad_in, std::string_view format_name, std::string_view mode_name,
                  double lr, double beta1, double beta2, double eps, double weight_decay, const OptionalTensor& master,
                  const OptionalTensor& residual, const OptionalTensor& exp_avg_absmax,
                  const OptionalTensor& exp_avg_sq_absmax, const OptionalTensor& active_in,
                  const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalTensor& changed,
                  bool stochastic, int64_t seed, int64_t first_element) {
  const Format format = check_format(format_name);
  const AdamMode mode = checked(parse_adam_mode, mode_name);
  check_scalars(lr, beta1, beta2, eps, weight_decay, first_element);
  TORCH_CHECK_VALUE(mode != AdamMode::eco || beta1 > 0, "beta1: expected more than 0 in mode 'eco', got ", beta1);
  const DType grad_dtype = check_f32_or_bf16(grad_in, "grad");
  TORCH_CHECK_VALUE(grad_in.dim() >= 2, "grad: expected shape [rows.., cols], got ", grad_in.sizes());
  const at::IntArrayRef rows = grad_in.sizes().slice(0, grad_in.dim() - 1);
  const int64_t cols = grad_in.size(-1);
  check_writable(codes, "codes", at::kByte, with_last(rows, code_bytes(format, cols)));
  check_writable(absmax, "absmax", scale_type(format), with_last(rows, num_blocks(format, cols)));
  check_moment(exp_avg, "exp_avg", exp_avg_absmax, "exp_avg_absmax", grad_in.sizes(), codes);
  check_moment(exp_avg_sq, "exp_avg_sq", exp_avg_sq_absmax, "exp_avg_sq_absmax", grad_in.sizes(), codes);
  check_writable(step, "step", at::kInt, rows);
  check_device(absmax, "absmax", codes);
  check_device(step, "step", codes);
  check_device(grad_in, "grad", codes);
  check_mode_state(master, "master", mode == AdamMode::master, mode_name);
  check_mode_state(residual, "residual", mode == AdamMode::residual, mode_name);
  DType master_dtype = DType::f32;
  if (master.has_value()) {
    master_dtype = check_f32_or_bf16(*master, "master");
    check_writable(*master, "master", master->scalar_type(), grad_in.sizes());
    check_device(*master, "master", codes);
  }
  if (residual.has_value()) {
    check_writable(*residual, "residual", at::kChar, grad_in.sizes());
    check_device(*residual, "residual", codes);
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
                        mutable_or_null<int8_t>(residual),
                        exp_avg.mutable_data_ptr(),
                        exp_avg_sq.mutable_data_ptr(),
                        mutable_or_null<float>(exp_avg_absmax),
                        mutable_or_null<float>(exp_avg_sq_absmax),
                        step.mutable_data_ptr<int32_t>(),
                        grad.const_data_ptr(),
                        data_or_null<bool>(active),
                        data_or_null<float>(grad_scale),
                        data_or_null<float>(found_inf),
                        mutable_or_null<int32_t>(changed),
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
                        master_dtype,
                        grad_dtype,
                        stochastic},
                       guard.stream());
}

template <class Backend>
Tensor dequantize_moments8(const Tensor& codes_in, const Tensor& absmax_in, bool is_signed) {
  check_dtype(codes_in, "codes", at::kByte);
  check_dtype(absmax_in, "absmax", at::kFloat);
  TORCH_CHECK_VALUE(codes_in.dim() >= 1, "codes: expected shape [rows.., cols], got ", codes_in.sizes());
  const at::IntArrayRef rows = codes_in.sizes().slice(0, codes_in.dim() - 1);
  check_shape(absmax_in, "absmax", with_last(rows, num_moment_blocks(codes_in.size(-1))));
  check_device(absmax_in, "absmax", codes_in);

  const typename Backend::Guard guard(codes_in);
  const Tensor codes = codes_in.contiguous(), absmax = absmax_in.contiguous();
  Tensor out = at::empty(codes.sizes(), codes.options().dtype(at::kFloat));
  Backend::decode_moments8({codes.const_data_ptr<uint8_t>(), absmax.const_data_ptr<float>(),
                            out.mutable_data_ptr<float>(), c10::multiply_integers(rows), codes.size(-1), is_signed},
                           guard.stream());
  return out;
}

template <class Backend>
void register_adam(torch::Library& m) {
  m.impl("masked_adam_", &masked_adam_<Backend>);
  m.impl("dequantize_moments8", &dequantize_moments8<Backend>);
}

}  // namespace

TORCH_LIBRARY_IMPL(usaf, CPU, m) { register_adam<CpuBackend>(m); }
#ifdef USAF_WITH_GPU
TORCH_LIBRARY_IMPL(usaf, USAF_GPU_KEY, m) { register_adam<GpuBackend>(m); }
#endif

}  // namespace usaf

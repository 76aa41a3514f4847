// dequantize_residual and quantize_residual.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "backend.h"
#include "checks.h"

namespace usaf {
namespace {

using at::Tensor;

// `values` is [rows.., cols]; codes and absmax must be those of such rows.
Format check_rows(const Tensor& values, const char* name, const Tensor& codes, const Tensor& absmax,
                  std::string_view format_name) {
  const Format format = check_format(format_name);
  TORCH_CHECK_VALUE(values.dim() >= 1, name, ": expected shape [rows.., cols], got ", values.sizes());
  const at::IntArrayRef rows = values.sizes().slice(0, values.dim() - 1);
  const int64_t cols = values.size(-1);
  check_dtype(codes, "codes", at::kByte);
  check_shape(codes, "codes", with_last(rows, code_bytes(format, cols)));
  check_dtype(absmax, "absmax", scale_type(format));
  check_shape(absmax, "absmax", with_last(rows, num_blocks(format, cols)));
  check_device(absmax, "absmax", codes);
  check_device(values, name, codes);
  return format;
}

int64_t num_rows(const Tensor& values) { return c10::multiply_integers(values.sizes().slice(0, values.dim() - 1)); }

template <class Backend>
Tensor dequantize_residual(const Tensor& codes_in, const Tensor& absmax_in, const Tensor& residual_in,
                           std::string_view format_name) {
  check_dtype(residual_in, "residual", at::kChar);
  const Format format = check_rows(residual_in, "residual", codes_in, absmax_in, format_name);

  const typename Backend::Guard guard(codes_in);
  const Tensor codes = codes_in.contiguous(), absmax = absmax_in.contiguous(), residual = residual_in.contiguous();
  Tensor weight = at::empty(residual.sizes(), residual.options().dtype(at::kFloat));
  Backend::decode_residual(
      {codes.const_data_ptr<uint8_t>(), absmax.const_data_ptr(), const_cast<int8_t*>(residual.const_data_ptr<int8_t>()),
       weight.mutable_data_ptr<float>(), num_rows(residual), residual.size(-1), format},
      guard.stream());
  return weight;
}

template <class Backend>
Tensor quantize_residual(const Tensor& weight_in, const Tensor& codes_in, const Tensor& absmax_in,
                         std::string_view format_name) {
  check_dtype(weight_in, "weight", at::kFloat);
  const Format format = check_rows(weight_in, "weight", codes_in, absmax_in, format_name);

  const typename Backend::Guard guard(codes_in);
  const Tensor codes = codes_in.contiguous(), absmax = absmax_in.contiguous(), weight = weight_in.contiguous();
  Tensor residual = at::empty(weight.sizes(), weight.options().dtype(at::kChar));
  Backend::encode_residual(
      {codes.const_data_ptr<uint8_t>(), absmax.const_data_ptr(), residual.mutable_data_ptr<int8_t>(),
       const_cast<float*>(weight.const_data_ptr<float>()), num_rows(weight), weight.size(-1), format},
      guard.stream());
  return residual;
}

template <class Backend>
void register_residual(torch::Library& m) {
  m.impl("dequantize_residual", &dequantize_residual<Backend>);
  m.impl("quantize_residual", &quantize_residual<Backend>);
}

}  // namespace

TORCH_LIBRARY_IMPL(usaf, CPU, m) { register_residual<CpuBackend>(m); }
#ifdef USAF_WITH_GPU
TORCH_LIBRARY_IMPL(usaf, USAF_GPU_KEY, m) { register_residual<GpuBackend>(m); }
#endif

}  // namespace usaf

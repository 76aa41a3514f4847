// quantize_blocks, dequantize_blocks, quantize_rows_.
#include <ATen/core/Tensor.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../numerics/float16.h"
#include "backend.h"
#include "checks.h"

namespace usaf {
namespace {

using at::Tensor;

// The largest magnitude of a weight in this format.
float weight_limit(Format format) { return format == Format::nf4_f16 ? kF16Max : std::numeric_limits<float>::max(); }

bool within(const Tensor& values, float limit) {
  if (values.numel() == 0) return true;
  const auto [low, high] = at::aminmax(values);                         // a NaN wins both
  const Tensor ends = at::stack({low, high}).to(at::kCPU, at::kFloat);  // together: the host waits for a GPU once
  const float* end = ends.const_data_ptr<float>();
  return -limit <= end[0] && end[1] <= limit;
}

// Names the first weight that is not finite or too large, if there is one.
void refuse_values(const Tensor& weight, float limit) {
  const Tensor bad = at::abs(weight.flatten().to(at::kFloat)).le(limit).logical_not().nonzero();
  if (bad.size(0) == 0) return;
  const int64_t first = bad.select(0, 0).item<int64_t>();
  const float value = weight.flatten().select(0, first).item<float>();
  TORCH_CHECK_VALUE(!std::isfinite(value), "weight: expected magnitudes up to ", limit,
                    " (the scales of nf4_f16 are fp16), got ", value, " at flat index ", first);
  TORCH_CHECK_VALUE(false, "weight: expected finite values, got ", value, " at flat index ", first);
}

// Codes and scales of `cols` weights a row, any leading shape.
void check_encoded(const Tensor& codes, const Tensor& absmax, int64_t cols, Format format) {
  check_dtype(codes, "codes", at::kByte);
  check_dtype(absmax, "absmax", scale_type(format));
  TORCH_CHECK_VALUE(cols >= 0, "cols: expected at least 0, got ", cols);
  TORCH_CHECK_VALUE(codes.dim() >= 1 && codes.size(-1) == code_bytes(format, cols),
                    "codes: expected a last dimension of ", code_bytes(format, cols), " bytes for ", cols,
                    " columns of ", format_name(format), ", got shape ", codes.sizes());
  check_shape(absmax, "absmax", with_last(codes.sizes().slice(0, codes.dim() - 1), num_blocks(format, cols)));
  check_device(absmax, "absmax", codes);
}

template <class Backend>
void check_rows(const Tensor& rows, const Tensor& codes, bool distinct) {
  check_dim(codes, "codes", 2);
  check_dim(rows, "rows", 1);
  check_dtype(rows, "rows", at::kLong);
  check_device(rows, "rows", codes);
  if constexpr (Backend::kHostMemory) {
    check_range<int64_t>(rows, "rows", 0, codes.size(0));
    if (!distinct) return;
    std::vector<bool> seen(static_cast<size_t>(codes.size(0)), false);
    for (int64_t i = 0; i < rows.numel(); ++i) {
      const int64_t row = rows.const_data_ptr<int64_t>()[i];
      TORCH_CHECK_VALUE(!seen[static_cast<size_t>(row)], "rows: expected distinct rows, got ", row, " twice");
      seen[static_cast<size_t>(row)] = true;
    }
  }
}

template <class Backend>
std::tuple<Tensor, Tensor> quantize_blocks(const Tensor& weight_in, std::string_view format_name) {
  const Format format = check_format(format_name);
  const DType dtype = check_float(weight_in, "weight");
  TORCH_CHECK_VALUE(weight_in.dim() >= 1, "weight: expected at least 1 dimension, got a 0-dim tensor");
  const typename Backend::Guard guard(weight_in);
  const Tensor weight = weight_in.contiguous();
  const float limit = weight_limit(format);
  if (format == Format::bf16 && !within(weight, limit)) refuse_values(weight, limit);
  const int64_t cols = weight.size(-1);
  const at::IntArrayRef leading = weight.sizes().slice(0, weight.dim() - 1);
  Tensor codes = at::empty(with_last(leading, code_bytes(format, cols)), weight.options().dtype(at::kByte));
  Tensor absmax = at::empty(with_last(leading, num_blocks(format, cols)), weight.options().dtype(scale_type(format)));
  Backend::encode_rows({weight.const_data_ptr(), codes.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr(), nullptr,
                        c10::multiply_integers(leading), cols, cols, format, dtype},
                       guard.stream());
  // A block's scale is finite if its weights are, and fit: a look at the scales spares one at the weights.
  if (!within(absmax, limit)) refuse_values(weight, limit);
  return {codes, absmax};
}

template <class Backend>
Tensor dequantize_blocks(const Tensor& codes_in, const Tensor& absmax_in, int64_t cols, std::string_view format_name,
                         at::ScalarType dtype, const std::optional<Tensor>& rows_in) {
  const Format format = check_format(format_name);
  check_encoded(codes_in, absmax_in, cols, format);
  const DType out_dtype = check_float_type(dtype, "dtype");
  const typename Backend::Guard guard(codes_in);
  const Tensor codes = codes_in.contiguous(), absmax = absmax_in.contiguous();
  at::DimVector sizes = with_last(codes.sizes().slice(0, codes.dim() - 1), cols);
  Tensor rows;
  if (rows_in.has_value()) {
    rows = rows_in->contiguous();
    check_rows<Backend>(rows, codes, false);
    sizes[0] = rows.size(0);
  }
  Tensor out = at::empty(sizes, codes.options().dtype(dtype));
  const int64_t num_rows = c10::multiply_integers(at::IntArrayRef(sizes).slice(0, sizes.size() - 1));
  Backend::decode_rows(
      {codes.const_data_ptr<uint8_t>(), absmax.const_data_ptr(), out.mutable_data_ptr(),
       rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr, nullptr, num_rows, cols, cols, format, out_dtype},
      guard.stream());
  return out;
}

template <class Backend>
void quantize_rows_(const Tensor& codes, const Tensor& absmax, const Tensor& rows_in, const Tensor& weight_in,
                    std::string_view format_name) {
  const Format format = check_format(format_name);
  const DType dtype = check_float(weight_in, "weight");
  check_dim(weight_in, "weight", 2);
  const int64_t cols = weight_in.size(1);
  check_encoded(codes, absmax, cols, format);
  check_writable(codes, "codes", at::kByte, codes.sizes());
  check_writable(absmax, "absmax", scale_type(format), absmax.sizes());
  check_device(weight_in, "weight", codes);
  const typename Backend::Guard guard(codes);
  const Tensor rows = rows_in.contiguous(), weight = weight_in.contiguous();
  check_rows<Backend>(rows, codes, true);
  check_shape(weight, "weight", {rows.size(0), cols});
  if (!within(weight, weight_limit(format))) refuse_values(weight, weight_limit(format));
  Backend::encode_rows({weight.const_data_ptr(), codes.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr(),
                        rows.const_data_ptr<int64_t>(), rows.size(0), cols, cols, format, dtype},
                       guard.stream());
}

template <class Backend>
void register_codec(torch::Library& m) {
  m.impl("quantize_blocks", &quantize_blocks<Backend>);
  m.impl("dequantize_blocks", &dequantize_blocks<Backend>);
  m.impl("quantize_rows_", &quantize_rows_<Backend>);
}

}  // namespace

TORCH_LIBRARY_IMPL(usaf, CPU, m) { register_codec<CpuBackend>(m); }
#ifdef USAF_WITH_GPU
TORCH_LIBRARY_IMPL(usaf, USAF_GPU_KEY, m) { register_codec<GpuBackend>(m); }
#endif

}  // namespace usaf

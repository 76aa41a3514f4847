// Argument checks of the op adapters. They raise Python's TypeError or ValueError, name the argument, and say what was
// expected and what came. An adapter runs all of them before it writes a byte.
#pragma once
#include <ATen/core/Tensor.h>

#include <string_view>

#include "../enum_names.h"
#include "../kernel_api.h"

namespace usaf {

inline void check_dtype(const at::Tensor& tensor, const char* name, at::ScalarType expected) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, name, ": expected ", expected, ", got ", tensor.scalar_type());
}

// float32, bfloat16 or float16.
inline DType check_float_type(at::ScalarType type, const char* name) {
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
                   ": expected Float, BFloat16 or Half, got ", type);
  return type == at::kFloat ? DType::f32 : type == at::kBFloat16 ? DType::bf16 : DType::f16;
}

inline DType check_float(const at::Tensor& tensor, const char* name) {
  return check_float_type(tensor.scalar_type(), name);
}

inline void check_shape(const at::Tensor& tensor, const char* name, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, name, ": expected shape ", expected, ", got ", tensor.sizes());
}

inline void check_dim(const at::Tensor& tensor, const char* name, int64_t dim) {
  TORCH_CHECK_VALUE(tensor.dim() == dim, name, ": expected ", dim, " dimension(s), got shape ", tensor.sizes());
}

inline void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& reference) {
  TORCH_CHECK_VALUE(tensor.device() == reference.device(), name, ": expected device ", reference.device(), ", got ",
                    tensor.device());
}

// A tensor that the op writes in place.
inline void check_writable(const at::Tensor& tensor, const char* name, at::ScalarType expected, at::IntArrayRef shape) {
  check_dtype(tensor, name, expected);
  check_shape(tensor, name, shape);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ", tensor.strides());
}

// Every value in [low, high). Host tensors only.
template <class Int>
void check_range(const at::Tensor& tensor, const char* name, int64_t low, int64_t high) {
  const Int* values = tensor.const_data_ptr<Int>();
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    TORCH_CHECK_VALUE(values[i] >= low && values[i] < high, name, ": expected values from ", low, " to ", high - 1,
                      ", got ", values[i], " at position ", i);
  }
}

template <class Int>
void check_ascending(const at::Tensor& tensor, const char* name) {
  const Int* values = tensor.const_data_ptr<Int>();
  for (int64_t i = 1; i < tensor.numel(); ++i) {
    TORCH_CHECK_VALUE(values[i - 1] <= values[i], name, ": expected ascending values, got ", values[i - 1], " before ",
                      values[i], " at position ", i);
  }
}

// parse(value) with the native std::invalid_argument as a ValueError.
template <class Parse>
auto checked(const Parse& parse, std::string_view value) {
  try {
    return parse(value);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

inline Format check_format(std::string_view value) { return checked(parse_format, value); }

// The dtype of the format's scales.
inline at::ScalarType scale_type(Format format) { return scale_bytes(format) == 2 ? at::kHalf : at::kFloat; }

// leading + {last}.
inline at::DimVector with_last(at::IntArrayRef leading, int64_t last) {
  at::DimVector sizes(leading.begin(), leading.end());
  sizes.push_back(last);
  return sizes;
}

}  // namespace usaf

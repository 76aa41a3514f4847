// The names by which Python gives formats, activations, modes and dtypes.
#pragma once
#include <array>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "kernel_api.h"

namespace usaf {

template <class Enum, size_t N>
using EnumNames = std::array<std::pair<const char*, Enum>, N>;

// Throws std::invalid_argument that names the argument and the choices.
template <class Enum, size_t N>
Enum parse_enum(std::string_view value, const char* argument, const EnumNames<Enum, N>& choices) {
  std::string names;
  for (const auto& [name, result] : choices) {
    if (value == name) return result;
    names += (names.empty() ? "'" : ", '") + std::string(name) + "'";
  }
  throw std::invalid_argument(std::string(argument) + ": expected one of " + names + ", got '" + std::string(value) +
                              "'");
}

inline Format parse_format(std::string_view value) {
  EnumNames<Format, kNumFormats> choices;
  for (int i = 0; i < kNumFormats; ++i) {
    choices[static_cast<size_t>(i)] = {format_name(static_cast<Format>(i)), static_cast<Format>(i)};
  }
  return parse_enum(value, "format", choices);
}

inline Activation parse_activation(std::string_view value) {
  return parse_enum<Activation, 3>(value, "activation",
                                   {{{"silu", Activation::silu},
                                     {"gelu_tanh", Activation::gelu_tanh},
                                     {"swiglu_clamped", Activation::swiglu_clamped}}});
}

inline AdamMode parse_adam_mode(std::string_view value) {
  return parse_enum<AdamMode, 4>(value, "mode",
                                 {{{"master", AdamMode::master},
                                   {"in_place", AdamMode::in_place},
                                   {"residual", AdamMode::residual},
                                   {"eco", AdamMode::eco}}});
}

inline DType parse_dtype(std::string_view value) {
  return parse_enum<DType, 3>(value, "dtype",
                              {{{"float32", DType::f32}, {"bfloat16", DType::bf16}, {"float16", DType::f16}}});
}

}  // namespace usaf

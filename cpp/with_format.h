// A format known at run time as a template argument.
#pragma once
#include <stdexcept>

#include "numerics/formats.h"

namespace usaf {

// body.operator()<kFormat>().
template <class Body>
void with_format(Format format, const Body& body) {
  switch (format) {
    case Format::bf16:
      return body.template operator()<Format::bf16>();
    case Format::nf4:
      return body.template operator()<Format::nf4>();
    case Format::nf4_f16:
      return body.template operator()<Format::nf4_f16>();
    case Format::int8:
      return body.template operator()<Format::int8>();
    case Format::fp8:
      return body.template operator()<Format::fp8>();
  }
  throw std::invalid_argument("format: unknown");
}

}  // namespace usaf

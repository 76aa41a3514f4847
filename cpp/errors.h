// The native exceptions; python_module.cpp maps each to the class of the same name in usaf_ext.errors.
// std::invalid_argument becomes ValueError.
#pragma once
#include <stdexcept>

namespace usaf {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct StoreError : Error {
  using Error::Error;
};
struct BudgetError : Error {
  using Error::Error;
};
struct DeviceError : Error {
  using Error::Error;
};

}  // namespace usaf

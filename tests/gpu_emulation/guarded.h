// Test-only: a launcher's exceptions as a status and a message, for ctypes.
#pragma once
#include <exception>
#include <string>

std::string& driver_message();

// 0, or 1 with the message set to what was thrown.
template <class Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    driver_message() = error.what();
    return 1;
  }
}

// Common parts of the fixtures. Tests call their functions through ctypes; each returns the error message or
// null.
#pragma once

#include <exception>
#include <string>

#include "ops/cuda/launch.cuh"

#define FIXTURE extern "C" __attribute__((visibility("default"))) const char*

template <typename Body>
const char* message_of(Body body) {
  static std::string message;
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

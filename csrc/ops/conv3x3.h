// conv3x3: what guards memory.
#pragma once

#include "stable_compat.h"

namespace panfpn {

inline void check_conv3x3_inputs(const Tensor& input, const Tensor& weight) {
  const char* op = "conv3x3";
  STD_TORCH_CHECK(input.dim() == 4, op, ": input must be [N, C, H, W]");
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(1) == input.size(1) && weight.size(2) == 3 && weight.size(3) == 3, op,
      ": weight must be [K, C, 3, 3]");
  // Whole registers only.
  STD_TORCH_CHECK(
      weight.size(0) > 0 && weight.size(0) % 16 == 0 && weight.size(1) > 0 && weight.size(1) % 16 == 0, op,
      ": takes multiples of 16 channels only");
  STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float, op,
                  ": takes float32 only");
  STD_TORCH_CHECK(weight.device() == input.device(), op, ": input and weight must be on one device");
}

}  // namespace panfpn

// Checks of conv3x3, conv3x3_prepare and conv3x3_prepared that guard memory.
#pragma once

#include <optional>

#include "stable_compat.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

inline void check_conv3x3_dtype(const Tensor& t, const char* op, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  op, name, " must be float32, float16 or bfloat16");
}

inline void check_conv3x3_weight(const Tensor& weight, const char* op) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.size(0) > 0 &&
                      weight.size(1) > 0,
                  op, ": weight must be [K, C, 3, 3]");
  check_conv3x3_dtype(weight, op, ": weight");
}

// Checks everything but the weights, whose numbers of outputs and input channels are given.
inline void check_conv3x3_inputs(const Tensor& input, int64_t outputs, int64_t channels,
                                 const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                 const char* op) {
  STD_TORCH_CHECK(input.dim() == 4 && input.size(1) == channels, op, ": input must be [N, ", channels,
                  ", H, W] for these weights");
  check_conv3x3_dtype(input, op, ": input");
  const ScalarType dtype = input.scalar_type();
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == outputs && bias->scalar_type() == dtype, op,
                    ": bias must be [K] in the dtype of input");
    STD_TORCH_CHECK(bias->device() == input.device(), op, ": bias and input must be on one device");
  }
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->dim() == 4 && residual->size(0) == input.size(0) &&
                        residual->size(1) == outputs && residual->size(2) == input.size(2) &&
                        residual->size(3) == input.size(3) && residual->scalar_type() == dtype,
                    op, ": residual must have the shape of the output and the dtype of input");
    STD_TORCH_CHECK(residual->device() == input.device(), op, ": residual and input must be on one device");
  }
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

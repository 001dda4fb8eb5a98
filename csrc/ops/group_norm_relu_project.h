// Checks of group_norm_relu_project that guard memory.
#pragma once

#include "ops/group_norm.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

inline void check_group_norm_relu_project_inputs(const Tensor& input, const Tensor& mean, const Tensor& rstd,
                                                 const Tensor& weight, const Tensor& bias,
                                                 const Tensor& proj_weight,
                                                 const std::optional<Tensor>& proj_bias,
                                                 const std::optional<Tensor>& residual) {
  const char* op = "group_norm_relu_project";
  check_group_norm_inputs(input, mean, rstd, weight, bias, op);
  STD_TORCH_CHECK(proj_weight.dim() == 2 && proj_weight.size(0) >= 1 && proj_weight.size(1) == input.size(1),
                  op, ": proj_weight must be [K, C]");
  STD_TORCH_CHECK(proj_weight.scalar_type() == input.scalar_type() && proj_weight.device() == input.device(),
                  op, ": proj_weight must have the dtype and device of input");
  const int64_t outputs = proj_weight.size(0);
  if (proj_bias.has_value()) {
    STD_TORCH_CHECK(proj_bias->dim() == 1 && proj_bias->size(0) == outputs, op, ": proj_bias must be [K]");
    STD_TORCH_CHECK(proj_bias->scalar_type() == input.scalar_type() && proj_bias->device() == input.device(),
                    op, ": proj_bias must have the dtype and device of input");
  }
  if (residual.has_value()) {
    STD_TORCH_CHECK(
        residual->dim() == 4 && residual->size(0) == input.size(0) && residual->size(1) == outputs, op,
        ": residual must be [N, K, H, W] or [N, K, H / 2, W / 2]");
    const int64_t height = residual->size(2), width = residual->size(3);
    STD_TORCH_CHECK((height == input.size(2) && width == input.size(3)) ||
                        (2 * height == input.size(2) && 2 * width == input.size(3)),
                    op, ": residual must be [N, K, H, W] or [N, K, H / 2, W / 2]");
    STD_TORCH_CHECK(residual->scalar_type() == input.scalar_type() && residual->device() == input.device(),
                    op, ": residual must have the dtype and device of input");
  }
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

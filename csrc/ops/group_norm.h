// Checks of the ops for GroupNorm and for the ReLU, upsampling and prediction that follow it.
#pragma once

#include <cstdint>

#include "stable_compat.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_group_norm_statistics_inputs(const Tensor& input, int64_t num_groups, double eps) {
  const char* op = "group_norm_statistics";
  STD_TORCH_CHECK(input.dim() == 4, op, ": input must be [N, C, H, W]");
  STD_TORCH_CHECK(num_groups >= 1 && input.size(1) % num_groups == 0, op,
                  ": num_groups must divide the number of channels, ", input.size(1), ", got ", num_groups);
  STD_TORCH_CHECK(eps > 0, op, ": eps must be above 0, got ", eps);
}

// Checks the inputs of every op that normalises with given statistics.
inline void check_group_norm_inputs(const Tensor& input, const Tensor& mean, const Tensor& rstd,
                                    const Tensor& weight, const Tensor& bias, const char* op) {
  STD_TORCH_CHECK(input.dim() == 4, op, ": input must be [N, C, H, W]");
  for (const Tensor* statistic : {&mean, &rstd}) {
    STD_TORCH_CHECK(statistic->dim() == 2 && statistic->size(0) == input.size(0) &&
                        statistic->size(1) == mean.size(1) && mean.size(1) >= 1 &&
                        input.size(1) % mean.size(1) == 0,
                    op, ": mean and rstd must be [N, num_groups]");
    STD_TORCH_CHECK(statistic->scalar_type() == accumulate_dtype(input.scalar_type()), op,
                    ": mean and rstd must be float32 (float64 for float64 input)");
    STD_TORCH_CHECK(statistic->device() == input.device(), op, ": all tensors must be on one device");
  }
  for (const Tensor* parameter : {&weight, &bias}) {
    STD_TORCH_CHECK(parameter->dim() == 1 && parameter->size(0) == input.size(1), op,
                    ": weight and bias must be [C]");
    STD_TORCH_CHECK(parameter->scalar_type() == weight.scalar_type(), op,
                    ": weight and bias must have the same dtype");
    STD_TORCH_CHECK(parameter->device() == input.device(), op, ": all tensors must be on one device");
  }
}

// Larger than any factor in use, and small enough that no size overflows.
constexpr int64_t kMaxScaleFactor = int64_t{1} << 16;

inline void check_scale_factor(int64_t scale_factor, const char* op) {
  STD_TORCH_CHECK(scale_factor >= 1 && scale_factor <= kMaxScaleFactor, op, ": scale_factor must be 1 to ",
                  kMaxScaleFactor, ", got ", scale_factor);
}

// Checks `large`, a residual or a gradient that has the size of `small` after upsampling.
inline void check_upsampled(const Tensor& large, const Tensor& small, int64_t scale_factor, const char* name,
                            const char* op) {
  check_scale_factor(scale_factor, op);
  STD_TORCH_CHECK(large.dim() == 4 && large.size(0) == small.size(0) && large.size(1) == small.size(1) &&
                      large.size(2) == small.size(2) * scale_factor &&
                      large.size(3) == small.size(3) * scale_factor,
                  op, ": ", name, " must be [N, C, scale_factor * H, scale_factor * W]");
  STD_TORCH_CHECK(large.scalar_type() == small.scalar_type() && large.device() == small.device(), op, ": ",
                  name, " must have the dtype and device of input");
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

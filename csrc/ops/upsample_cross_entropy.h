// Cross-entropy of upsampled logits: definitions and checks that both directions share.
#pragma once

#include <limits>
#include <optional>
#include <string>

#include "ops/upsample.h"
#include "stable_compat.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

enum class Reduction { mean, sum, none };

inline Reduction loss_reduction(const std::string& name) {
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  STD_TORCH_CHECK(name == "none", "upsample_cross_entropy: reduction must be mean, sum or none, got ", name);
  return Reduction::none;
}

// The dtype of the loss, of the tensors saved for backward, and of the class weights.
inline ScalarType loss_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_upsample_cross_entropy_inputs(const Tensor& logits, const Tensor& target,
                                                const std::optional<Tensor>& weight, int64_t scale_factor) {
  const char* op = "upsample_cross_entropy";
  STD_TORCH_CHECK(logits.dim() == 4, op, ": logits must be [N, C, H, W]");
  STD_TORCH_CHECK(logits.size(1) > 0 && logits.size(1) <= std::numeric_limits<int32_t>::max(), op,
                  ": logits must have at least one class");
  STD_TORCH_CHECK(scale_factor > 0 && scale_factor <= std::numeric_limits<int32_t>::max(), op,
                  ": scale_factor must be between 1 and 2^31 - 1, got ", scale_factor);
  STD_TORCH_CHECK(target.dim() == 3 && target.size(0) == logits.size(0) &&
                      target.size(1) == logits.size(2) * scale_factor &&
                      target.size(2) == logits.size(3) * scale_factor,
                  op, ": target must be [N, H * scale_factor, W * scale_factor]");
  const ScalarType labels = target.scalar_type();
  STD_TORCH_CHECK(labels == ScalarType::Byte || labels == ScalarType::Short || labels == ScalarType::Int ||
                      labels == ScalarType::Long,
                  op, ": target must be uint8, int16, int32 or int64");
  STD_TORCH_CHECK(target.device() == logits.device(), op, ": logits and target must be on one device");
  if (weight.has_value()) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == logits.size(1) &&
                        weight->scalar_type() == loss_dtype(logits) && weight->device() == logits.device(),
                    op,
                    ": weight must be [C], float32 (float64 for float64 logits), on the device of logits");
  }
}

inline void check_upsample_cross_entropy_backward_inputs(
    const Tensor& grad, const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
    const Tensor& log_sum_exp, const Tensor& total_weight, int64_t scale_factor, Reduction reduction) {
  const char* op = "upsample_cross_entropy_backward";
  check_upsample_cross_entropy_inputs(logits, target, weight, scale_factor);
  for (const Tensor* saved : {&grad, &log_sum_exp, &total_weight}) {
    STD_TORCH_CHECK(
        saved->scalar_type() == loss_dtype(logits) && saved->device() == logits.device(), op,
        ": grad, log_sum_exp and total_weight must have the dtype of the loss and the device of logits");
    const bool scalar = saved == &total_weight || (saved == &grad && reduction != Reduction::none);
    if (scalar) {
      STD_TORCH_CHECK(saved->dim() == 0, op,
                      ": total_weight, and grad for reduction mean or sum, must be scalars");
    } else {
      STD_TORCH_CHECK(saved->dim() == 3 && saved->size(0) == target.size(0) &&
                          saved->size(1) == target.size(1) && saved->size(2) == target.size(2),
                      op, ": log_sum_exp, and grad for reduction none, must have the shape of target");
    }
  }
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

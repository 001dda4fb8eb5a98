// The pooling that roi_align and multiscale_roi_align share. csrc/ops/cpu/roi_pool*.cpp and
// csrc/ops/cuda/roi_pool*.cu each define these functions for their library.
#pragma once

#include "ops/roi_align.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// Pools checked inputs on one level or several; returns [K, C, pooled_height, pooled_width]. The CPU takes
// any floating dtype, a GPU float32 and narrower ones.
Tensor pool_features(const std::vector<Tensor>& features, const std::vector<double>& scales,
                     const Tensor& boxes, const RoiAlignParams& params, const char* op);

// Returns the gradient of each feature map, given `grad`, the gradient of the pooled output. If
// `deterministic`, the terms of each sum are added in the order of the boxes; otherwise a GPU uses atomics,
// which add in any order. The CPU is always deterministic: the order of its sums depends on the boxes alone,
// not on the number of threads.
std::vector<Tensor> pool_features_backward(const Tensor& grad, const std::vector<double>& scales,
                                           const Tensor& boxes, const MapSizes& sizes, bool channels_last,
                                           bool deterministic, const RoiAlignParams& params, const char* op);

}  // namespace panfpn::inline PANFPN_ARITHMETIC

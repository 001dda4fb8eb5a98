// What roi_align and multiscale_roi_align have in common on the GPU.
#pragma once

#include "ops/cuda/launch.cuh"
#include "ops/roi_align.h"

namespace panfpn {

// Pools checked inputs, float32 or narrower, on one level or several; returns [K, C, pooled_height,
// pooled_width].
Tensor pool_features(const std::vector<Tensor>& features, const std::vector<double>& scales,
                     const Tensor& boxes, const RoiAlignParams& params, const char* op);

// The gradient of each feature map for `grad`, that of the pooled output. Fast: atomics, in any order.
// Deterministic: each pixel collects its sum in the order of the boxes.
std::vector<Tensor> pool_features_backward(const Tensor& grad, const std::vector<double>& scales,
                                           const Tensor& boxes, const MapSizes& sizes, bool channels_last,
                                           bool deterministic, const RoiAlignParams& params, const char* op);

}  // namespace panfpn

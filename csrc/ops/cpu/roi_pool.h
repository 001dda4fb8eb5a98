// What roi_align and multiscale_roi_align have in common on the CPU.
#pragma once

#include "ops/roi_align.h"

namespace panfpn {

// Pools checked inputs of any floating dtype, on one level or several; returns [K, C, pooled_height,
// pooled_width].
Tensor pool_features(const std::vector<Tensor>& features, const std::vector<double>& scales,
                     const Tensor& boxes, const RoiAlignParams& params, const char* op);

// The gradient of each feature map for `grad`, that of the pooled output. The order of its sums depends on
// the boxes alone, not on the number of threads.
std::vector<Tensor> pool_features_backward(const Tensor& grad, const std::vector<double>& scales,
                                           const Tensor& boxes, const MapSizes& sizes, bool channels_last,
                                           const RoiAlignParams& params, const char* op);

}  // namespace panfpn

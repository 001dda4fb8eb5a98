// What roi_align and multiscale_roi_align have in common on the CPU.
#pragma once

#include "ops/roi_align.h"

namespace panfpn {

// Pools checked inputs of any floating dtype, on one level or several; returns [K, C, pooled_height,
// pooled_width].
Tensor pool_features(const std::vector<Tensor>& features, const std::vector<double>& scales,
                     const Tensor& boxes, const RoiAlignParams& params, const char* op);

}  // namespace panfpn

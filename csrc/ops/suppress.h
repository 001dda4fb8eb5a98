// The suppression that the three NMS ops share. csrc/ops/cpu/suppress.cpp and csrc/ops/cuda/suppress.cu each
// define these functions for their library.
#pragma once

#include <utility>

#include "ops/nms.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// Takes the checked inputs of one image (boxes [N, 4]) or of a batch ([B, N, 4]). If `idxs` is null, all
// boxes are in one group. Returns `keep` [max_output] or [B, max_output], padded with -1, and the number of
// kept boxes, [] or [B]. On a GPU the host does not wait for the device.
std::pair<Tensor, Tensor> suppress(const Tensor& boxes, const Tensor& scores, const Tensor* idxs,
                                   double iou_threshold, int64_t max_output);

// Returns the indices of all kept boxes of one image. On a GPU the host waits for their number.
Tensor suppress_all(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold);

}  // namespace panfpn::inline PANFPN_ARITHMETIC

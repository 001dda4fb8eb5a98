// What the NMS ops have in common on the GPU.
#pragma once

#include <utility>

#include "ops/cuda/launch.cuh"
#include "ops/nms.h"

namespace panfpn {

// keep [max_output] or [B, max_output], filled up with -1, and count [] or [B], from checked inputs with or
// without a batch dimension; `idxs` may be null: one group. No host sync.
std::pair<Tensor, Tensor> suppress(const Tensor& boxes, const Tensor& scores, const Tensor* idxs,
                                   double iou_threshold, int64_t max_output);

// All kept indices of one image. The host reads their number.
Tensor suppress_all(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold);

}  // namespace panfpn

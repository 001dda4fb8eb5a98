// What nms and batched_nms have in common on the GPU.
#pragma once

#include "ops/cuda/launch.cuh"
#include "ops/nms.h"

namespace panfpn {

// Indices of the kept boxes, from checked inputs; `idxs` may be null: one group.
Tensor suppress(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold);

}  // namespace panfpn

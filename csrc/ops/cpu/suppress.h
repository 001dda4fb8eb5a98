// What nms and batched_nms have in common on the CPU.
#pragma once

#include "ops/nms.h"

namespace panfpn {

// Indices of the kept boxes, from checked inputs; `idxs` may be null: one group.
Tensor suppress(const Tensor& boxes, const Tensor& scores, const int64_t* idxs, double iou_threshold);

}  // namespace panfpn

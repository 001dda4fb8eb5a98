// What the NMS ops have in common on the CPU.
#pragma once

#include "ops/nms.h"

namespace panfpn {

// One image's candidates, checked and contiguous.
struct Candidates {
  const void* boxes;  // [count, 4], float32 or float64
  ScalarType box_dtype;
  const void* scores;  // [count], float32 or float64
  ScalarType score_dtype;
  const int64_t* idxs;  // [count], or null: one group
  int64_t count;
};

// Writes the indices of the kept boxes by descending score, the first `max_output` of them; returns how many.
int64_t suppress(const Candidates& candidates, double iou_threshold, int64_t max_output, int64_t* keep);

// The same for nms and batched_nms: a tensor of all the kept ones.
Tensor suppress_all(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold);

}  // namespace panfpn

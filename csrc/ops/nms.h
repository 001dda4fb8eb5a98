// Greedy non-maximum suppression: what both devices share.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "ops/host_device.h"
#include "stable_compat.h"

namespace panfpn {

template <typename T>
struct Box {
  T x1, y1, x2, y2;
};

template <typename T>
PANFPN_HOST_DEVICE T box_area(const Box<T>& b) {
  return (b.x2 - b.x1) * (b.y2 - b.y1);
}

// Intersection over union above the threshold; 0/0 is NaN and compares false, so empty boxes never suppress.
template <typename T>
PANFPN_HOST_DEVICE bool iou_above(const Box<T>& a, const Box<T>& b, T threshold) {
  const T left = a.x1 > b.x1 ? a.x1 : b.x1, right = a.x2 < b.x2 ? a.x2 : b.x2;
  const T top = a.y1 > b.y1 ? a.y1 : b.y1, bottom = a.y2 < b.y2 ? a.y2 : b.y2;
  const T width = right - left > T(0) ? right - left : T(0);
  const T height = bottom - top > T(0) ? bottom - top : T(0);
  const T intersection = width * height;
  return intersection / (box_area(a) + box_area(b) - intersection) > threshold;
}

inline void check_nms_inputs(const Tensor& boxes, const Tensor& scores) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "nms: boxes must be [N, 4]");
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == boxes.size(0), "nms: scores must be [N]");
  STD_TORCH_CHECK(scores.device() == boxes.device(), "nms: boxes and scores must be on one device");
}

inline void check_batched_nms_inputs(const Tensor& boxes, const Tensor& scores, const Tensor& idxs) {
  check_nms_inputs(boxes, scores);
  STD_TORCH_CHECK(idxs.dim() == 1 && idxs.size(0) == boxes.size(0) && idxs.scalar_type() == ScalarType::Long,
                  "batched_nms: idxs must be int64 [N]");
  STD_TORCH_CHECK(idxs.device() == boxes.device(), "batched_nms: boxes and idxs must be on one device");
}

}  // namespace panfpn

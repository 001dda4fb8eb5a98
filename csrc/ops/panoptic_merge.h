// Panoptic merging: what both devices share.
#pragma once

#include <string>

#include "ops/paste_masks.h"

namespace panfpn {

// Stuff labels are counted in a table of this size; labels outside of it are void.
constexpr int64_t kMaxLabels = 4096;

// A row of the segment table: id, isthing, label, area, instance.
constexpr int64_t kSegmentColumns = 5;

struct MergeParams {
  double score_threshold, overlap_threshold;
  int64_t stuff_area_threshold;
  double mask_threshold;
};

// The share of an instance that others claimed before, compared as detectron2 does: integers divided in
// double.
PANFPN_HOST_DEVICE bool overlaps_too_much(int64_t claimed, int64_t area, double overlap_threshold) {
  return static_cast<double>(claimed) / static_cast<double>(area) > overlap_threshold;
}

inline void check_panoptic_merge_inputs(const Tensor& masks, const Tensor& boxes, const Tensor& scores,
                                        const Tensor& classes, const Tensor& semantic,
                                        const std::string& rule) {
  const char* op = "panoptic_merge";
  check_mask_boxes(masks, boxes, op);
  STD_TORCH_CHECK(
      scores.dim() == 1 && scores.size(0) == masks.size(0) && scores.scalar_type() == ScalarType::Float, op,
      ": scores must be float32 [N]");
  STD_TORCH_CHECK(
      classes.dim() == 1 && classes.size(0) == masks.size(0) && classes.scalar_type() == ScalarType::Long, op,
      ": classes must be int64 [N]");
  STD_TORCH_CHECK(semantic.dim() == 2, op, ": semantic must be [H, W]");
  const ScalarType labels = semantic.scalar_type();
  STD_TORCH_CHECK(labels == ScalarType::Byte || labels == ScalarType::Short || labels == ScalarType::Int ||
                      labels == ScalarType::Long,
                  op, ": semantic must be uint8, int16, int32 or int64");
  STD_TORCH_CHECK(scores.device() == masks.device() && classes.device() == masks.device() &&
                      semantic.device() == masks.device(),
                  op, ": all inputs must be on one device");
  STD_TORCH_CHECK(rule == "detectron2", op, ": unknown rule ", rule);
}

}  // namespace panfpn

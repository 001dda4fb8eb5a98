// Panoptic merging: what both devices share.
#pragma once

#include <string>

#include "ops/paste_masks.h"

namespace panfpn {

// Stuff labels are counted in a table of this size; labels outside of it are void.
constexpr int64_t kMaxLabels = 4096;

// A row of the segment table: id, isthing, label, area, instance.
constexpr int64_t kSegmentColumns = 5;

// Whose merger decides the corners.
enum class MergeRule : int32_t { detectron2, mmdetection, panopticapi };

struct MergeParams {
  double score_threshold, overlap_threshold;
  int64_t stuff_area_threshold;
  double mask_threshold;
  MergeRule rule;
};

inline MergeRule merge_rule(const std::string& name, const char* op) {
  if (name == "detectron2") return MergeRule::detectron2;
  if (name == "mmdetection") return MergeRule::mmdetection;
  STD_TORCH_CHECK(name == "panopticapi", op, ": unknown rule ", name);
  return MergeRule::panopticapi;
}

enum class Placement { place, skip, stop };

// What the score says about an instance whose turn it is.
PANFPN_HOST_DEVICE Placement placement(float score, const MergeParams& params) {
  if (!(static_cast<double>(score) < params.score_threshold)) return Placement::place;
  // In score order what follows is below the threshold as well, except for NaN, which comes last.
  return params.rule == MergeRule::panopticapi ? Placement::skip : Placement::stop;
}

// Whether others claimed too large a share of an instance before it, in each peer's own arithmetic: integers
// divided in double, or in float32 by an area that is kept from being zero.
PANFPN_HOST_DEVICE bool overlaps_too_much(int64_t claimed, int64_t area, const MergeParams& params) {
  if (params.rule == MergeRule::mmdetection) {
    return static_cast<float>(claimed) / (static_cast<float>(area) + 1e-5f) >
           static_cast<float>(params.overlap_threshold);
  }
  return static_cast<double>(claimed) / static_cast<double>(area) > params.overlap_threshold;
}

inline void check_panoptic_merge_inputs(const Tensor& masks, const Tensor& boxes, const Tensor& scores,
                                        const Tensor& classes, const Tensor& semantic, const char* op) {
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
}

}  // namespace panfpn

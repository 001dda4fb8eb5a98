// Panoptic merging: the peers' rules and the checks, which both devices share.
#pragma once

#include <optional>
#include <string>

#include "ops/paste_masks.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// The size of the table that counts stuff labels; larger labels are void.
constexpr int64_t kMaxLabels = 4096;

// A row of the segment table: id, isthing, label, area, instance.
constexpr int64_t kSegmentColumns = 5;

// The peer whose merging decides the corner cases.
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
  STD_TORCH_CHECK(name == "panopticapi", op, ": rule must be detectron2, mmdetection or panopticapi, got ",
                  name);
  return MergeRule::panopticapi;
}

enum class Placement { place, skip, stop };

// The decision about the next instance, given its score.
PANFPN_HOST_DEVICE Placement placement(float score, const MergeParams& params) {
  if (!(static_cast<double>(score) < params.score_threshold)) return Placement::place;
  // The remaining instances are below the threshold too, because they have lower scores. (NaN scores come
  // last; they are not compared.)
  return params.rule == MergeRule::panopticapi ? Placement::skip : Placement::stop;
}

// Returns whether earlier instances claimed too large a share of an instance, in the arithmetic of each peer:
// integers divided in double, or in float32 by an area with a small offset that avoids division by zero.
PANFPN_HOST_DEVICE bool overlaps_too_much(int64_t claimed, int64_t area, const MergeParams& params) {
  if (params.rule == MergeRule::mmdetection) {
    return static_cast<float>(claimed) / (static_cast<float>(area) + 1e-5f) >
           static_cast<float>(params.overlap_threshold);
  }
  return static_cast<double>(claimed) / static_cast<double>(area) > params.overlap_threshold;
}

// The tensors to merge. `semantic` is [H, W] of any integer dtype that the check below allows.
struct MergeInputs {
  Tensor masks, boxes, scores, classes, semantic;
};

// The panoptic map [H, W], the segment table [S, kSegmentColumns] and the number of segments [].
struct Merged {
  Tensor panoptic, segments, count;
};

// Merges checked inputs. Without `max_segments`, the table has one row for each segment; on a GPU the host
// waits for their number. With it, the table has `max_segments` rows, padded with {0, 0, -1, 0, -1}, and the
// host does not wait. csrc/ops/cpu/panoptic_merge.cpp and csrc/ops/cuda/panoptic_merge.cu each define this
// function for their library.
Merged merge_segments(const MergeInputs& inputs, const MergeParams& params,
                      std::optional<int64_t> max_segments, const char* op);

inline void check_panoptic_merge_inputs(const MergeInputs& inputs, const char* op) {
  const auto& [masks, boxes, scores, classes, semantic] = inputs;
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

}  // namespace panfpn::inline PANFPN_ARITHMETIC

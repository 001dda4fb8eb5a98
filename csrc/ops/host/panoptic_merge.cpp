#include "ops/panoptic_merge.h"

#include <tuple>

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

std::tuple<Tensor, Tensor> panoptic_merge(const Tensor& masks, const Tensor& boxes, const Tensor& scores,
                                          const Tensor& classes, const Tensor& semantic,
                                          double score_threshold, double overlap_threshold,
                                          int64_t stuff_area_threshold, double mask_threshold,
                                          const std::string& rule) {
  const char* op = "panoptic_merge";
  const MergeInputs inputs{masks, boxes, scores, classes, semantic};
  const MergeParams params{score_threshold, overlap_threshold, stuff_area_threshold, mask_threshold,
                           merge_rule(rule, op)};
  check_panoptic_merge_inputs(inputs, op);
  const Merged merged = merge_segments(inputs, params, std::nullopt, op);
  return {merged.panoptic, merged.segments};
}

std::tuple<Tensor, Tensor, Tensor> panoptic_merge_padded(const Tensor& masks, const Tensor& boxes,
                                                         const Tensor& scores, const Tensor& classes,
                                                         const Tensor& semantic, double score_threshold,
                                                         double overlap_threshold,
                                                         int64_t stuff_area_threshold, double mask_threshold,
                                                         const std::string& rule, int64_t max_segments) {
  const char* op = "panoptic_merge_padded";
  STD_TORCH_CHECK(max_segments >= 0, op, ": max_segments must be at least 0, got ", max_segments);
  const MergeInputs inputs{masks, boxes, scores, classes, semantic};
  const MergeParams params{score_threshold, overlap_threshold, stuff_area_threshold, mask_threshold,
                           merge_rule(rule, op)};
  check_panoptic_merge_inputs(inputs, op);
  const Merged merged = merge_segments(inputs, params, max_segments, op);
  return {merged.panoptic, merged.segments, merged.count};
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("panoptic_merge", TORCH_BOX(&panoptic_merge));
  m.impl("panoptic_merge_padded", TORCH_BOX(&panoptic_merge_padded));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

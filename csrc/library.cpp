// Every op's schema. Their semantics are told where people read them, in the docstrings of panfpn_fast/ops;
// the Python function validates for people, upcasts half-precision boxes and masks, and makes lists of boxes
// one tensor.
#include "stable_compat.h"

PANFPN_LIBRARY(m) {
  // Average of bilinear samples in each cell of each box; boxes [K, 5] with the batch index first.
  m.def(
      "roi_align(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
      "SymInt sampling_ratio, bool aligned) -> Tensor");

  // Its input's gradient, [batch, C, height, width] in the named layout.
  m.def(
      "roi_align_backward(Tensor grad, Tensor boxes, float spatial_scale, SymInt sampling_ratio, bool "
      "aligned, "
      "SymInt batch, SymInt height, SymInt width, bool channels_last, bool deterministic) -> Tensor");

  // The same from the pyramid level that each box's size assigns it to.
  m.def(
      "multiscale_roi_align(Tensor[] features, Tensor boxes, float[] spatial_scales, SymInt pooled_height, "
      "SymInt pooled_width, SymInt sampling_ratio, bool aligned, float canonical_box_size, SymInt "
      "canonical_level, "
      "float level_epsilon) -> Tensor");

  // Its features' gradients.
  m.def(
      "multiscale_roi_align_backward(Tensor grad, Tensor boxes, float[] spatial_scales, SymInt "
      "sampling_ratio, "
      "bool aligned, float canonical_box_size, SymInt canonical_level, float level_epsilon, SymInt batch, "
      "SymInt[] heights, SymInt[] widths, bool channels_last, bool deterministic) -> Tensor[]");

  // Indices of the kept boxes, by descending score.
  m.def("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor");

  // The same, where only boxes with equal idxs suppress each other.
  m.def("batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor");

  // The same in static shapes: kept indices, filled up with -1, and their number. Each may have a batch
  // dimension.
  m.def(
      "nms_padded(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, SymInt max_output) "
      "-> (Tensor, Tensor)");

  // [N, H, W] masks from [N, M, M] probabilities: bool, or uint8 for a negative threshold.
  m.def("paste_masks(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold) -> Tensor");

  // The same masks as COCO run lengths: all strings one after the other, and where each begins, [N + 1].
  m.def(
      "paste_masks_rle(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold) -> (Tensor, "
      "Tensor)");

  // Panoptic map, and an int64 table [S, 5] of id, isthing, label, area, instance.
  m.def(
      "panoptic_merge(Tensor masks, Tensor boxes, Tensor scores, Tensor classes, Tensor semantic, "
      "float score_threshold, float overlap_threshold, SymInt stuff_area_threshold, float mask_threshold, "
      "str rule) -> (Tensor, Tensor)");

  // The same with a table of fixed size, padded, and the number of segments as a tensor.
  m.def(
      "panoptic_merge_padded(Tensor masks, Tensor boxes, Tensor scores, Tensor classes, Tensor semantic, "
      "float score_threshold, float overlap_threshold, SymInt stuff_area_threshold, float mask_threshold, "
      "str rule, SymInt max_segments) -> (Tensor, Tensor, Tensor)");
}

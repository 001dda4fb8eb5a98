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

  // The semantic head. On CUDA these are Triton's (panfpn_fast/kernels), under the same names and with the
  // same schemas in the namespace panfpn_fast_triton.

  // Class of the largest logit [N, height, width] after an upsampling by the factor, a crop and a resize to
  // (height, width), and its softmax probability (empty unless asked for).
  m.def(
      "upsample_argmax(Tensor logits, SymInt scale_factor, SymInt crop_height, SymInt crop_width, SymInt "
      "height, "
      "SymInt width, bool return_prob) -> (Tensor, Tensor)");

  // Loss (a scalar, or [N, H, W] for reduction "none"), and what its backward needs: the logarithm of each
  // pixel's sum of exponentials [N, H, W] (on the CPU less the upsampled maxima of the logits) and the sum of
  // the targets' weights.
  m.def(
      "upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, SymInt scale_factor, SymInt "
      "ignore_index, float label_smoothing, str reduction) -> (Tensor, Tensor, Tensor)");

  // Its logits' gradient.
  m.def(
      "upsample_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, Tensor "
      "log_sum_exp, Tensor total_weight, SymInt scale_factor, SymInt ignore_index, float label_smoothing, "
      "str "
      "reduction) -> Tensor");

  // 3x3 convolution with padding 1 and no bias, float32, channels-last; on the CPU only.
  m.def("conv3x3(Tensor input, Tensor weight) -> Tensor");

  // Mean and reciprocal standard deviation of each group, [N, num_groups].
  m.def("group_norm_statistics(Tensor input, SymInt num_groups, float eps) -> (Tensor, Tensor)");

  // Normalises, applies ReLU, upsamples and adds, in one pass.
  m.def(
      "group_norm_relu_upsample(Tensor input, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, SymInt "
      "scale_factor, Tensor? residual) -> Tensor");

  // Gradients of its input (through the statistics too), weight and bias.
  m.def(
      "group_norm_relu_upsample_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd, Tensor weight, "
      "Tensor bias, SymInt scale_factor) -> (Tensor, Tensor, Tensor)");

  // Normalises, applies ReLU and multiplies by the matrix [K, C] -> [N, K, H, W]; adds the residual,
  // upsampled by 2 where it is half as large.
  m.def(
      "group_norm_relu_project(Tensor input, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor "
      "proj_weight, Tensor? proj_bias, Tensor? residual) -> Tensor");

  // Gradient of the input of a bilinear upsampling.
  m.def("bilinear_upsample_backward(Tensor grad, SymInt scale_factor) -> Tensor");
}

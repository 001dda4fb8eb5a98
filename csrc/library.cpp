// The schemas of all ops. The docstrings of the public functions in panfpn_fast/ops describe what the ops
// compute. The public functions also validate the arguments, convert half-precision boxes and masks to
// float32, and concatenate lists of boxes.
#include "stable_compat.h"

PANFPN_LIBRARY(m) {
  // The mean of bilinear samples in each bin of each box; boxes are [K, 5] with the batch index first.
  m.def(
      "roi_align(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
      "SymInt sampling_ratio, bool aligned) -> Tensor");

  // The gradient of its input, [batch, C, height, width], in the given layout.
  m.def(
      "roi_align_backward(Tensor grad, Tensor boxes, float spatial_scale, SymInt sampling_ratio, bool "
      "aligned, "
      "SymInt batch, SymInt height, SymInt width, bool channels_last, bool deterministic) -> Tensor");

  // The same, from the pyramid level that the size of each box selects.
  m.def(
      "multiscale_roi_align(Tensor[] features, Tensor boxes, float[] spatial_scales, SymInt pooled_height, "
      "SymInt pooled_width, SymInt sampling_ratio, bool aligned, float canonical_box_size, SymInt "
      "canonical_level, "
      "float level_epsilon) -> Tensor");

  // The gradients of its features.
  m.def(
      "multiscale_roi_align_backward(Tensor grad, Tensor boxes, float[] spatial_scales, SymInt "
      "sampling_ratio, "
      "bool aligned, float canonical_box_size, SymInt canonical_level, float level_epsilon, SymInt batch, "
      "SymInt[] heights, SymInt[] widths, bool channels_last, bool deterministic) -> Tensor[]");

  // The indices of the kept boxes, by descending score.
  m.def("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor");

  // The same; only boxes with equal idxs suppress each other.
  m.def("batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor");

  // The same with static shapes: the indices of the kept boxes, padded with -1, and their number. All tensors
  // may have a batch dimension.
  m.def(
      "nms_padded(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, SymInt max_output) "
      "-> (Tensor, Tensor)");

  // Masks [N, H, W] from probabilities [N, M, M]: bool, or uint8 for a negative threshold.
  m.def("paste_masks(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold) -> Tensor");

  // The same masks as COCO run lengths: the concatenated strings, and their offsets [N + 1].
  m.def(
      "paste_masks_rle(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold) -> (Tensor, "
      "Tensor)");

  // The panoptic map, and an int64 table [S, 5] of id, isthing, label, area, instance.
  m.def(
      "panoptic_merge(Tensor masks, Tensor boxes, Tensor scores, Tensor classes, Tensor semantic, "
      "float score_threshold, float overlap_threshold, SymInt stuff_area_threshold, float mask_threshold, "
      "str rule) -> (Tensor, Tensor)");

  // The same with a padded table of fixed size, and the number of segments as a tensor.
  m.def(
      "panoptic_merge_padded(Tensor masks, Tensor boxes, Tensor scores, Tensor classes, Tensor semantic, "
      "float score_threshold, float overlap_threshold, SymInt stuff_area_threshold, float mask_threshold, "
      "str rule, SymInt max_segments) -> (Tensor, Tensor, Tensor)");

  // The semantic head. Triton host functions (panfpn_fast/ops/triton) implement these ops on CUDA.

  // The class of the largest logit, [N, height, width], after upsampling by the factor, cropping, and
  // resizing to (height, width); and its softmax probability (empty unless requested).
  m.def(
      "upsample_argmax(Tensor logits, SymInt scale_factor, SymInt crop_height, SymInt crop_width, SymInt "
      "height, "
      "SymInt width, bool return_prob) -> (Tensor, Tensor)");

  // The loss (a scalar, or [N, H, W] for reduction "none"), and two tensors for backward: the logarithm of
  // each pixel's sum of exponentials [N, H, W] (on the CPU relative to the upsampled maxima of the logits),
  // and the sum of the targets' weights.
  m.def(
      "upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, SymInt scale_factor, SymInt "
      "ignore_index, float label_smoothing, str reduction) -> (Tensor, Tensor, Tensor)");

  // The gradient of its logits.
  m.def(
      "upsample_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, Tensor "
      "log_sum_exp, Tensor total_weight, SymInt scale_factor, SymInt ignore_index, float label_smoothing, "
      "str "
      "reduction) -> Tensor");

  // 3x3 convolution with stride 1 and padding 1, plus bias and residual, then ReLU if requested: Winograd's
  // algorithm in float32, CPU only.
  m.def("conv3x3(Tensor input, Tensor weight, Tensor? bias, bool relu, Tensor? residual) -> Tensor");

  // Its weights [K, C, 3, 3], transformed for tiles of 2 x 2 or 4 x 4 outputs: [(tile + 2)^2, C, K rounded up
  // to a multiple of 16].
  m.def("conv3x3_prepare(Tensor weight, SymInt tile) -> Tensor");

  // The same convolution with weights from conv3x3_prepare.
  m.def(
      "conv3x3_prepared(Tensor input, Tensor prepared, SymInt outputs, Tensor? bias, bool relu, Tensor? "
      "residual) "
      "-> Tensor");

  // The gradient of its weights, [K, C, 3, 3] in channels-last layout, for the gradient of its output.
  m.def("conv3x3_weight_gradient(Tensor grad, Tensor input) -> Tensor");

  // 3x3 convolution with padding 1 and no bias; the mean and the reciprocal standard deviation of each group
  // of its result, [N, num_groups]. Python registers both implementations; the one for the CPU calls other
  // ops.
  m.def(
      "conv3x3_statistics(Tensor input, Tensor weight, SymInt num_groups, float eps) -> (Tensor, Tensor, "
      "Tensor)");

  // The mean and the reciprocal standard deviation of each group, [N, num_groups].
  m.def("group_norm_statistics(Tensor input, SymInt num_groups, float eps) -> (Tensor, Tensor)");

  // Normalises, applies ReLU, upsamples and adds the residual, in one pass.
  m.def(
      "group_norm_relu_upsample(Tensor input, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, SymInt "
      "scale_factor, Tensor? residual) -> Tensor");

  // The gradients of its input (including the path through the statistics), weight and bias.
  m.def(
      "group_norm_relu_upsample_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd, Tensor weight, "
      "Tensor bias, SymInt scale_factor) -> (Tensor, Tensor, Tensor)");

  // Normalises, applies ReLU and multiplies by the matrix [K, C] -> [N, K, H, W]; adds the residual, which is
  // upsampled by 2 if it has half the size.
  m.def(
      "group_norm_relu_project(Tensor input, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor "
      "proj_weight, Tensor? proj_bias, Tensor? residual) -> Tensor");

  // The gradient of the input of bilinear upsampling.
  m.def("bilinear_upsample_backward(Tensor grad, SymInt scale_factor) -> Tensor");
}

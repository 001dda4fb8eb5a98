#include "ops/roi_pool.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

Tensor multiscale_roi_align(const std::vector<Tensor>& features, const Tensor& boxes,
                            const std::vector<double>& spatial_scales, int64_t pooled_height,
                            int64_t pooled_width, int64_t sampling_ratio, bool aligned,
                            double canonical_box_size, int64_t canonical_level, double level_epsilon) {
  check_multiscale_roi_align_inputs(features, boxes, spatial_scales, pooled_height, pooled_width);
  const RoiAlignParams params{
      pooled_height, pooled_width, sampling_ratio, aligned,
      make_level_rule(canonical_box_size, canonical_level, level_epsilon, spatial_scales[0])};
  return pool_features(features, spatial_scales, boxes, params, "multiscale_roi_align");
}

std::vector<Tensor> multiscale_roi_align_backward(
    const Tensor& grad, const Tensor& boxes, const std::vector<double>& spatial_scales,
    int64_t sampling_ratio, bool aligned, double canonical_box_size, int64_t canonical_level,
    double level_epsilon, int64_t batch, const std::vector<int64_t>& heights,
    const std::vector<int64_t>& widths, bool channels_last, bool deterministic) {
  const MapSizes sizes{batch, heights, widths};
  check_roi_backward_inputs(grad, boxes, sizes, spatial_scales.size(), "multiscale_roi_align_backward");
  const RoiAlignParams params{
      grad.size(2), grad.size(3), sampling_ratio, aligned,
      make_level_rule(canonical_box_size, canonical_level, level_epsilon, spatial_scales[0])};
  return pool_features_backward(grad, spatial_scales, boxes, sizes, channels_last, deterministic, params,
                                "multiscale_roi_align_backward");
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align));
  m.impl("multiscale_roi_align_backward", TORCH_BOX(&multiscale_roi_align_backward));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

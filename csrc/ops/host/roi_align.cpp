#include "ops/roi_pool.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

Tensor roi_align(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                 int64_t pooled_width, int64_t sampling_ratio, bool aligned) {
  check_roi_align_inputs(input, boxes, pooled_height, pooled_width);
  const RoiAlignParams params{pooled_height, pooled_width, sampling_ratio, aligned, LevelRule{}};
  return pool_features({input}, {spatial_scale}, boxes, params, "roi_align");
}

Tensor roi_align_backward(const Tensor& grad, const Tensor& boxes, double spatial_scale,
                          int64_t sampling_ratio, bool aligned, int64_t batch, int64_t height, int64_t width,
                          bool channels_last, bool deterministic) {
  const MapSizes sizes{batch, {height}, {width}};
  check_roi_backward_inputs(grad, boxes, sizes, 1, "roi_align_backward");
  const RoiAlignParams params{grad.size(2), grad.size(3), sampling_ratio, aligned, LevelRule{}};
  return pool_features_backward(grad, {spatial_scale}, boxes, sizes, channels_last, deterministic, params,
                                "roi_align_backward")[0];
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

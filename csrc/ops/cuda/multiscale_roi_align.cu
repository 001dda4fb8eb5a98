#include "ops/cuda/roi_pool.h"

namespace panfpn {
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

}  // namespace

PANFPN_LIBRARY_IMPL_CUDA(m) {
  m.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align));
}

}  // namespace panfpn

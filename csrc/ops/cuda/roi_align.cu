#include "ops/cuda/roi_pool.h"

namespace panfpn {
namespace {

Tensor roi_align(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                 int64_t pooled_width, int64_t sampling_ratio, bool aligned) {
  check_roi_align_inputs(input, boxes, pooled_height, pooled_width);
  const RoiAlignParams params{pooled_height, pooled_width, sampling_ratio, aligned, LevelRule{}};
  return pool_features({input}, {spatial_scale}, boxes, params, "roi_align");
}

}  // namespace

PANFPN_LIBRARY_IMPL_CUDA(m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
}

}  // namespace panfpn

#include "ops/cuda/suppress.h"

namespace panfpn {
namespace {

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  check_nms_inputs(boxes, scores);
  return suppress_all(boxes, scores, nullptr, iou_threshold);
}

}  // namespace

PANFPN_LIBRARY_IMPL_CUDA(m) {
  m.impl("nms", TORCH_BOX(&nms));
}

}  // namespace panfpn

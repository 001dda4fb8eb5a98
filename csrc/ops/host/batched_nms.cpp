#include "ops/suppress.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
  check_batched_nms_inputs(boxes, scores, idxs);
  return suppress_all(boxes, scores, &idxs, iou_threshold);
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("batched_nms", TORCH_BOX(&batched_nms));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

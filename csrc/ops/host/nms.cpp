#include "ops/suppress.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  check_nms_inputs(boxes, scores);
  return suppress_all(boxes, scores, nullptr, iou_threshold);
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("nms", TORCH_BOX(&nms));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

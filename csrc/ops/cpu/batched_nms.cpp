#include "ops/cpu/suppress.h"

namespace panfpn {
namespace {

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
  check_batched_nms_inputs(boxes, scores, idxs);
  return suppress_all(boxes, scores, &idxs, iou_threshold);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panfpn_fast, CPU, m) {
  m.impl("batched_nms", TORCH_BOX(&batched_nms));
}

}  // namespace panfpn

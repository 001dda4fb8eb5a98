#include "ops/cpu/suppress.h"

namespace panfpn {
namespace {

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs_in, double iou_threshold) {
  check_batched_nms_inputs(boxes, scores, idxs_in);
  const Tensor idxs = torch::stable::contiguous(idxs_in);
  return suppress(boxes, scores, idxs.const_data_ptr<int64_t>(), iou_threshold);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panfpn_fast, CPU, m) {
  m.impl("batched_nms", TORCH_BOX(&batched_nms));
}

}  // namespace panfpn

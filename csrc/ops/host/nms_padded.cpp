#include <optional>
#include <tuple>

#include "ops/suppress.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

std::tuple<Tensor, Tensor> nms_padded(const Tensor& boxes, const Tensor& scores,
                                      const std::optional<Tensor>& idxs, double iou_threshold,
                                      int64_t max_output) {
  const Tensor* groups = idxs.has_value() ? &*idxs : nullptr;
  check_nms_padded_inputs(boxes, scores, groups, max_output);
  const auto [keep, count] = suppress(boxes, scores, groups, iou_threshold, max_output);
  return {keep, count};
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("nms_padded", TORCH_BOX(&nms_padded));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

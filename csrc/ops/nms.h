// Greedy non-maximum suppression: mathematics and checks that both devices share.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "ops/host_device.h"
#include "stable_compat.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

template <typename T>
struct Box {
  T x1, y1, x2, y2;
};

template <typename T>
PANFPN_HOST_DEVICE T box_area(const Box<T>& b) {
  return (b.x2 - b.x1) * (b.y2 - b.y1);
}

// Zero for disjoint boxes.
template <typename T>
PANFPN_HOST_DEVICE T intersection(const Box<T>& a, const Box<T>& b) {
  const T left = a.x1 > b.x1 ? a.x1 : b.x1, right = a.x2 < b.x2 ? a.x2 : b.x2;
  const T top = a.y1 > b.y1 ? a.y1 : b.y1, bottom = a.y2 < b.y2 ? a.y2 : b.y2;
  const T width = right - left > T(0) ? right - left : T(0);
  const T height = bottom - top > T(0) ? bottom - top : T(0);
  return width * height;
}

// Returns whether the intersection over union exceeds the threshold. 0/0 is NaN and compares false, so empty
// boxes never suppress. As in the peer, the quotient is rounded before it is compared. Most pairs need no
// division: if a quotient of positive numbers exceeds the threshold, the intersection is at least the rounded
// product.
template <typename T>
PANFPN_HOST_DEVICE bool iou_above(const Box<T>& a, T a_area, const Box<T>& b, T b_area, T threshold) {
  const T inter = intersection(a, b);
  const T both = a_area + b_area - inter;
  if (threshold >= T(0) && !(inter > T(0) && inter >= threshold * both)) return false;
  return inter / both > threshold;
}

// A key that sorts as a stable torch.sort sorts scores in descending order: smaller for larger scores,
// smallest for NaN, and equal for both zeros.
template <typename T>
using sort_key_t = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <typename T>
PANFPN_HOST_DEVICE sort_key_t<T> descending_key(T score) {
  using Key = sort_key_t<T>;
  if (score != score) return 0;
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  const Key bits = std::bit_cast<Key>(score + T(0));  // -0 + 0 is +0
  return (bits & kSign) != 0 ? bits : ~(bits | kSign);
}

inline void check_nms_inputs(const Tensor& boxes, const Tensor& scores) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "nms: boxes must be [N, 4]");
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == boxes.size(0), "nms: scores must be [N]");
  STD_TORCH_CHECK(scores.device() == boxes.device(), "nms: boxes and scores must be on one device");
}

inline void check_batched_nms_inputs(const Tensor& boxes, const Tensor& scores, const Tensor& idxs) {
  check_nms_inputs(boxes, scores);
  STD_TORCH_CHECK(idxs.dim() == 1 && idxs.size(0) == boxes.size(0) && idxs.scalar_type() == ScalarType::Long,
                  "batched_nms: idxs must be int64 [N]");
  STD_TORCH_CHECK(idxs.device() == boxes.device(), "batched_nms: boxes and idxs must be on one device");
}

// `idxs` may be null. Either all tensors have a batch dimension in front, or none has.
inline void check_nms_padded_inputs(const Tensor& boxes, const Tensor& scores, const Tensor* idxs,
                                    int64_t max_output) {
  const int64_t dims = boxes.dim();
  STD_TORCH_CHECK((dims == 2 || dims == 3) && boxes.size(dims - 1) == 4,
                  "nms_padded: boxes must be [N, 4] or [B, N, 4]");
  auto one_per_box = [&](const Tensor& t) {
    return t.dim() == dims - 1 && t.size(0) == boxes.size(0) && t.size(dims - 2) == boxes.size(dims - 2) &&
           t.device() == boxes.device();
  };
  STD_TORCH_CHECK(one_per_box(scores), "nms_padded: scores must be [N] or [B, N], on the device of boxes");
  STD_TORCH_CHECK(idxs == nullptr || (one_per_box(*idxs) && idxs->scalar_type() == ScalarType::Long),
                  "nms_padded: idxs must be int64 [N] or [B, N], on the device of boxes");
  STD_TORCH_CHECK(max_output >= 0, "nms_padded: max_output must be at least 0, got ", max_output);
}

// The uninitialised outputs of nms_padded: keep [max_output] and count [], each with the batch dimension of
// the boxes if they have one.
inline std::pair<Tensor, Tensor> empty_padded(const Tensor& boxes, int64_t max_output) {
  if (boxes.dim() == 2) {
    return {empty({max_output}, ScalarType::Long, boxes), empty({}, ScalarType::Long, boxes)};
  }
  return {empty({boxes.size(0), max_output}, ScalarType::Long, boxes),
          empty({boxes.size(0)}, ScalarType::Long, boxes)};
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// Pasting: where a pixel of the image falls on an M x M mask, and how the mask is interpolated there. A
// "cell" is one of the M x M values of the mask.
//
// One rounding decides a pixel on the edge of an object. So the float operations and their order are those of
// detectron2's paste_masks_in_image followed by torch's grid_sample (bilinear, zeros outside,
// align_corners=False). For the same reason, sources that include this file are compiled without fused
// multiply-adds.
#pragma once

#include <cmath>
#include <cstdint>

#include "ops/host_device.h"
#include "ops/range.h"
#include "stable_compat.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// The value of `low` for a pixel outside of the mask: neither this index nor the next is a cell.
constexpr int32_t kOutside = -2;

// Interpolation along one axis between the cells `low` and `low + 1`. One of them may be just outside of the
// mask.
template <typename A>
struct PasteTaps {
  int32_t low;
  A low_weight, high_weight;
};

// One axis of one box.
template <typename A>
struct PasteAxis {
  A low, high;
  int64_t mask_size;

  PANFPN_HOST_DEVICE bool degenerate() const {
    return !(std::isfinite(low) && std::isfinite(high) && std::isfinite(high - low)) || high == low;
  }

  PANFPN_HOST_DEVICE PasteTaps<A> taps(int64_t pixel) const {
    const A normalised = (static_cast<A>(pixel) + A(0.5) - low) / (high - low) * A(2) - A(1);
    const A position = (normalised + A(1)) * (static_cast<A>(mask_size) / A(2)) - A(0.5);
    if (!(position > A(-1) && position < static_cast<A>(mask_size))) return {kOutside, A(0), A(0)};
    const A floor = std::floor(position);
    return {static_cast<int32_t>(floor), floor + A(1) - position, position - floor};
  }

  // The pixels of an image of `size` that can fall on the mask, with a margin of two for rounding.
  PANFPN_HOST_DEVICE Range window(int64_t size) const {
    if (degenerate() || mask_size == 0) return {0, 0};
    const double extent = static_cast<double>(high) - static_cast<double>(low);
    const double rim = std::fabs(extent) * 0.5 / static_cast<double>(mask_size);
    const double first = std::floor((extent > 0 ? low : high) - rim) - 2.0;
    const double last = std::ceil((extent > 0 ? high : low) + rim) + 2.0;
    const double limit = static_cast<double>(size);
    const double begin = first < 0 ? 0 : (first > limit ? limit : first);
    const double end = last < begin ? begin : (last > limit ? limit : last);
    return {static_cast<int64_t>(begin), static_cast<int64_t>(end)};
  }
};

template <typename A>
PANFPN_HOST_DEVICE A interpolate(A top_left, A top_right, A bottom_left, A bottom_right,
                                 const PasteTaps<A>& y, const PasteTaps<A>& x) {
  return top_left * (x.low_weight * y.low_weight) + top_right * (x.high_weight * y.low_weight) +
         bottom_left * (x.low_weight * y.high_weight) + bottom_right * (x.high_weight * y.high_weight);
}

// Converts a pasted value to a pixel. For a threshold from 0 to 1, returns whether the value reaches it; for
// a negative threshold, returns the value scaled to 0 to 255.
template <typename A>
PANFPN_HOST_DEVICE uint8_t paste_pixel(A value, A threshold) {
  if (threshold >= A(0)) return value >= threshold;
  const A scaled = value * A(255);
  if (!(scaled > A(0))) return 0;  // NaN too
  return scaled < A(255) ? static_cast<uint8_t>(scaled) : uint8_t{255};
}

// Rows and columns of masks and images are counted in 32 bits; this limit leaves room for sums.
constexpr int64_t kSideLimit = int64_t{1} << 30;

inline void check_mask_boxes(const Tensor& masks, const Tensor& boxes, const char* op) {
  STD_TORCH_CHECK(masks.dim() == 3, op, ": masks must be [N, M, M]");
  STD_TORCH_CHECK(masks.size(1) < kSideLimit && masks.size(2) < kSideLimit, op,
                  ": masks must have fewer than 2^30 rows and columns");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4, op,
                  ": boxes must be [N, 4]");
  STD_TORCH_CHECK(boxes.scalar_type() == masks.scalar_type(), op,
                  ": masks and boxes must have the same dtype");
  STD_TORCH_CHECK(boxes.device() == masks.device(), op, ": masks and boxes must be on one device");
}

inline void check_paste_masks_inputs(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width,
                                     const char* op) {
  check_mask_boxes(masks, boxes, op);
  STD_TORCH_CHECK(height >= 0 && width >= 0, op, ": height and width must be at least 0, got ", height,
                  " and ", width);
  STD_TORCH_CHECK(height < kSideLimit && width < kSideLimit, op, ": height and width must be below 2^30");
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

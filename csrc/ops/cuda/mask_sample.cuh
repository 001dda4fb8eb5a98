// One instance's mask as it falls on the image, evaluated where a thread asks.
#pragma once

#include "ops/cuda/launch.cuh"
#include "ops/paste_masks.h"

namespace panfpn {

struct MaskSampler {
  const float* mask;
  PasteAxis<float> y, x;

  __device__ MaskSampler(const float* masks, const float* boxes, int64_t n, int64_t mask_height,
                         int64_t mask_width)
      : mask(masks + n * mask_height * mask_width),
        y{boxes[n * 4 + 1], boxes[n * 4 + 3], mask_height},
        x{boxes[n * 4], boxes[n * 4 + 2], mask_width} {}

  __device__ bool degenerate() const { return y.degenerate() || x.degenerate(); }

  __device__ float cell(int64_t row, int64_t column) const {
    const bool inside = row >= 0 && row < y.mask_size && column >= 0 && column < x.mask_size;
    return inside ? mask[row * x.mask_size + column] : 0.0f;
  }

  __device__ float value(const PasteTaps<float>& row, const PasteTaps<float>& column) const {
    if (!row.inside || !column.inside) return 0.0f;
    return interpolate(cell(row.low, column.low), cell(row.low, column.low + 1),
                       cell(row.low + 1, column.low), cell(row.low + 1, column.low + 1), row, column);
  }
};

}  // namespace panfpn

// The mask of one instance on the image. A thread processes a few columns of the box and walks down its rows.
// It keeps the terms of its columns in registers, and also the cells around its pixels, as long as the image
// row is between the same two rows of cells.
#pragma once

#include "ops/cuda/launch.cuh"
#include "ops/paste_masks.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

struct MaskSampler {
  const float* mask;
  PasteAxis<float> y, x;

  __device__ MaskSampler(const float* masks, const float* boxes, int64_t n, int64_t mask_height,
                         int64_t mask_width)
      : mask(masks + n * mask_height * mask_width),
        y{boxes[n * 4 + 1], boxes[n * 4 + 3], mask_height},
        x{boxes[n * 4], boxes[n * 4 + 2], mask_width} {}

  __device__ bool degenerate() const { return y.degenerate() || x.degenerate(); }

  // Zero outside of the mask.
  __device__ float cell(int row, int column) const {
    const int height = static_cast<int>(y.mask_size), width = static_cast<int>(x.mask_size);
    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
    return inside ? mask[int64_t{row} * width + column] : 0.0f;
  }
};

// The taps that another lane has. All lanes of the warp call this together.
__device__ inline PasteTaps<float> taps_of_lane(const PasteTaps<float>& own, int lane) {
  constexpr unsigned int kAllLanes = 0xFFFFFFFFu;
  return {__shfl_sync(kAllLanes, own.low, lane), __shfl_sync(kAllLanes, own.low_weight, lane),
          __shfl_sync(kAllLanes, own.high_weight, lane)};
}

// `kCount` columns of a thread, `kStep` apart, so that neighbouring threads process neighbouring pixels.
template <int kCount, int kStep>
class ColumnStrip {
 public:
  __device__ ColumnStrip(const MaskSampler& sampler, int64_t first) : sampler_(sampler) {
    const bool degenerate = sampler.degenerate();
    PANFPN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      columns_[i] = degenerate ? PasteTaps<float>{kOutside, 0.0f, 0.0f} : sampler.x.taps(first + i * kStep);
    }
  }

  // The values at the strip's columns in the image row with the given taps; zero outside of the mask.
  __device__ void values_at(const PasteTaps<float>& row, float (&values)[kCount]) {
    if (row.low != cell_row_) {
      cell_row_ = row.low;
      PANFPN_UNROLL
      for (int i = 0; i < kCount; ++i) {
        PANFPN_UNROLL
        for (int corner = 0; corner < 4; ++corner) {
          cells_[i][corner] = sampler_.cell(row.low + corner / 2, columns_[i].low + corner % 2);
        }
      }
    }
    PANFPN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      values[i] = interpolate(cells_[i][0], cells_[i][1], cells_[i][2], cells_[i][3], row, columns_[i]);
    }
  }

 private:
  const MaskSampler& sampler_;
  PasteTaps<float> columns_[kCount];
  float cells_[kCount][4] = {};
  int cell_row_ = kOutside;  // all cells of this row are zero
};

}  // namespace panfpn::inline PANFPN_ARITHMETIC

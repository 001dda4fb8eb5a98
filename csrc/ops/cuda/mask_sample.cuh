// One instance's mask as it falls on the image: a thread has a few columns of the box and walks down its
// rows. What depends on the column stays in registers, and the cells around its pixels as long as the row
// lies between the same two rows of cells.
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
};

// `kCount` columns of a thread, `kStep` apart: neighbouring threads then have neighbouring pixels.
template <int kCount, int kStep>
class ColumnStrip {
 public:
  __device__ ColumnStrip(const MaskSampler& sampler, int64_t first) : sampler_(sampler), cell_row_(-2) {
    const bool degenerate = sampler.degenerate();
    PANFPN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      columns_[i] = degenerate ? PasteTaps<float>{} : sampler.x.taps(first + i * kStep);
    }
  }

  // Values at the strip's columns of an image row; zero where the mask is not.
  __device__ void row(int64_t image_row, float (&values)[kCount]) {
    const PasteTaps<float> row = sampler_.y.taps(image_row);
    if (row.inside && row.low != cell_row_) {
      cell_row_ = row.low;
      PANFPN_UNROLL
      for (int i = 0; i < kCount; ++i) {
        PANFPN_UNROLL
        for (int corner = 0; corner < 4; ++corner) {
          cells_[i][corner] =
              columns_[i].inside ? sampler_.cell(row.low + corner / 2, columns_[i].low + corner % 2) : 0.0f;
        }
      }
    }
    PANFPN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float value =
          interpolate(cells_[i][0], cells_[i][1], cells_[i][2], cells_[i][3], row, columns_[i]);
      values[i] = row.inside && columns_[i].inside ? value : 0.0f;
    }
  }

 private:
  const MaskSampler& sampler_;
  PasteTaps<float> columns_[kCount];
  float cells_[kCount][4] = {};
  int64_t cell_row_;
};

}  // namespace panfpn

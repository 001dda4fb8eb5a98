// One instance's mask as it falls on the image, evaluated row by row within its box only.
#pragma once

#include <vector>

#include "ops/paste_masks.h"

namespace panfpn {

template <typename A>
class MaskWindow {
 public:
  // `whole_image`: the window is the image even where the box is not, for a threshold that zero reaches.
  MaskWindow(const A* mask, int64_t mask_height, int64_t mask_width, const A* box, int64_t image_height,
             int64_t image_width, bool whole_image)
      : y_axis_{box[1], box[3], mask_height}, stride_(mask_width + 2) {
    const PasteAxis<A> x_axis{box[0], box[2], mask_width};
    rows_ = whole_image ? PixelRange{0, image_height} : y_axis_.window(image_height);
    columns_ = whole_image ? PixelRange{0, image_width} : x_axis.window(image_width);
    if (!whole_image && x_axis.degenerate()) rows_.end = rows_.begin;
    if (rows_.begin == rows_.end) return;
    // A rim of zeros stands for everything outside the mask, so that no tap needs a test.
    padded_.assign((mask_height + 2) * stride_, A(0));
    for (int64_t y = 0; y < mask_height; ++y) {
      std::copy(mask + y * mask_width, mask + (y + 1) * mask_width, padded_.begin() + (y + 1) * stride_ + 1);
    }
    for (int64_t x = columns_.begin; x < columns_.end; ++x) taps_.push_back(x_axis.taps(x));
  }

  PixelRange rows() const { return rows_; }
  PixelRange columns() const { return columns_; }
  int64_t width() const { return columns_.end - columns_.begin; }

  // Calls f(i, value) for the i-th pixel of the window's columns in image row `y`.
  template <typename F>
  void for_row(int64_t y, F&& f) const {
    const PasteTaps<A> row = y_axis_.taps(y);
    const A* top = padded_.data() + (row.low + 1) * stride_ + 1;
    const A* bottom = top + stride_;
    for (int64_t i = 0; i < width(); ++i) {
      const PasteTaps<A>& column = taps_[i];
      const bool inside = row.inside && column.inside;
      f(i, inside ? interpolate(top[column.low], top[column.low + 1], bottom[column.low],
                                bottom[column.low + 1], row, column)
                  : A(0));
    }
  }

 private:
  PasteAxis<A> y_axis_;
  int64_t stride_;
  PixelRange rows_{}, columns_{};
  std::vector<A> padded_;
  std::vector<PasteTaps<A>> taps_;
};

}  // namespace panfpn

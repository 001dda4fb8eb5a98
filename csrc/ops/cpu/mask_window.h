// One instance's mask as it falls on the image, line by line within its box only. Pasting, run-length
// encoding and merging all ask here, so that they decide every pixel alike.
//
// Between the centres of four neighbouring mask cells a value is a mean of the four, so wherever all four lie
// clearly on one side of the threshold the pixels between them need no evaluation. What is left is the
// contour; it is evaluated in the operations and the order of `interpolate`.
#pragma once

#include <vector>

#include "ops/paste_masks.h"

namespace panfpn {

// Lines are rows of the image, or its columns.
enum class Scan { rows, columns };

// What becomes of a pixel's value: whether it reaches the threshold, or a byte 0..255.
template <typename A>
struct PixelRule {
  A threshold;
  bool bytes;

  bool zero_is_on() const { return !bytes && A(0) >= threshold; }
};

enum class Content : uint8_t { off, on, mixed };

// Pixels of a line that are all off, all on, or to be evaluated; counted from the window's first.
struct Stretch {
  int64_t begin, end;
  Content content;
};

// The pixels of one image axis that may fall on the mask.
template <typename A>
struct AxisTaps {
  // Pixels between the cells `cell` and `cell + 1`; kOutside where the mask is not.
  struct Run {
    int64_t begin, end;
    int32_t cell;
  };

  PixelRange pixels{0, 0};
  std::vector<int32_t> low;
  std::vector<A> low_weight, high_weight;
  std::vector<Run> runs;

  void fill(const PasteAxis<A>& axis, PixelRange range, bool degenerate);
  int64_t size() const { return pixels.end - pixels.begin; }
};

template <typename A>
class MaskWindow {
 public:
  // The window is where the box lies, or the whole image where the value zero is on.
  MaskWindow(Scan scan, const A* mask, int64_t mask_height, int64_t mask_width, const A* box,
             int64_t image_height, int64_t image_width, const PixelRule<A>& rule);

  // In pixels of the image; both empty where the window is.
  PixelRange lines() const { return outer_.pixels; }
  PixelRange across() const { return inner_.pixels; }
  bool empty() const { return outer_.size() == 0; }

 private:
  template <typename>
  friend class LineCursor;

  Scan scan_;
  PixelRule<A> rule_;
  AxisTaps<A> outer_, inner_;
  int64_t stride_;
  // A rim of zeros stands for everything outside the mask, so that no tap needs a test. Transposed for
  // columns.
  std::vector<A> padded_;
};

// Walks over a window's lines; each thread has its own.
template <typename A>
class LineCursor {
 public:
  explicit LineCursor(const MaskWindow<A>& window) : window_(window) {}

  // The stretches of image line `line`, which cover the window.
  const std::vector<Stretch>& move_to(int64_t line);

  // The pixels of a mixed stretch of the current line.
  void evaluate(const Stretch& stretch, uint8_t* out) const;

  // All pixels of an image line within the window.
  void write(int64_t line, uint8_t* out);

 private:
  Content classify(int32_t line, int32_t cell) const;
  void expand();

  const MaskWindow<A>& window_;
  int64_t index_ = 0;                // of the line in the window
  int32_t cell_ = -3;                // of the line; nothing lies there
  std::vector<Stretch> stretches_;   // of all lines between the same cells
  std::vector<A> near_[2], far_[2];  // for each pixel of mixed stretches: the cells before and after it
};

extern template class MaskWindow<float>;
extern template class MaskWindow<double>;
extern template class LineCursor<float>;
extern template class LineCursor<double>;

}  // namespace panfpn

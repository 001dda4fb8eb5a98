// The mask of one instance on the image, line by line within its box only. Pasting, run-length encoding and
// merging all use it, so that they agree on every pixel. A "cell" is one of the M x M values of the mask, a
// "pixel" is a pixel of the image.
//
// Between the centres of four neighbouring cells, a value is a weighted mean of the four. Wherever all four
// are clearly on one side of the threshold, the pixels between them need no evaluation. Only the contour
// remains; it is evaluated with the operations of `interpolate`, in their order.
#pragma once

#include <vector>

#include "ops/paste_masks.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// Lines are the rows or the columns of the image.
enum class Scan { rows, columns };

// How a value becomes a byte: whether it reaches the threshold, or its value scaled to 0 to 255.
template <typename A>
struct PixelRule {
  A threshold;
  bool bytes;

  bool zero_is_on() const { return !bytes && A(0) >= threshold; }
};

enum class Content : uint8_t { off, on, mixed };

// Pixels of a line that are all off, all on, or must be evaluated. Counted from the first pixel of the
// window.
struct Stretch {
  int64_t begin, end;
  Content content;
};

// The pixels along one image axis that may fall on the mask.
template <typename A>
struct AxisTaps {
  // The pixels between `cell` and `cell + 1`; kOutside if they are outside of the mask.
  struct Run {
    int64_t begin, end;
    int32_t cell;
  };

  Range pixels{0, 0};
  std::vector<int32_t> low;
  std::vector<A> low_weight, high_weight;
  std::vector<Run> runs;

  void fill(const PasteAxis<A>& axis, Range range, bool degenerate);
  int64_t size() const { return pixels.size(); }
};

template <typename A>
class MaskWindow {
 public:
  // The window is the box, or the whole image if the value zero reaches the threshold.
  MaskWindow(Scan scan, const A* mask, int64_t mask_height, int64_t mask_width, const A* box,
             int64_t image_height, int64_t image_width, const PixelRule<A>& rule);

  // In pixels of the image; both are empty if the window is empty.
  Range lines() const { return outer_.pixels; }
  Range across() const { return inner_.pixels; }
  bool empty() const { return outer_.size() == 0; }

 private:
  template <typename>
  friend class LineCursor;

  Scan scan_;
  PixelRule<A> rule_;
  AxisTaps<A> outer_, inner_;
  int64_t stride_;
  // The cells with a border of zeros, so that no tap needs a bounds check. Transposed for columns.
  std::vector<A> padded_;
};

// Walks through the lines of a window; each thread has its own cursor.
template <typename A>
class LineCursor {
 public:
  explicit LineCursor(const MaskWindow<A>& window) : window_(window) {}

  // Returns the stretches of image line `line`; together they cover the window.
  const std::vector<Stretch>& move_to(int64_t line);

  // Evaluates the pixels of a mixed stretch of the current line.
  void evaluate(const Stretch& stretch, uint8_t* out) const;

  // Writes all pixels of an image line that are within the window.
  void write(int64_t line, uint8_t* out);

 private:
  Content classify(int32_t line, int32_t cell) const;
  void expand();

  const MaskWindow<A>& window_;
  int64_t index_ = 0;                // of the current line, in the window
  int32_t cell_ = -3;                // of the current line; the initial value matches no line
  std::vector<Stretch> stretches_;   // of all lines between the same cells
  std::vector<A> near_[2], far_[2];  // for each pixel of the mixed stretches: the cells before and after it
};

extern template class MaskWindow<float>;
extern template class MaskWindow<double>;
extern template class LineCursor<float>;
extern template class LineCursor<double>;

}  // namespace panfpn::inline PANFPN_ARITHMETIC

#include <algorithm>
#include <cstring>

#include "ops/cpu/mask_window.h"
#include "ops/cpu/pages.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

constexpr int64_t kGrainPixels = int64_t{1} << 17;  // per task

// Writes the rows `begin` to `end` of one image. Pixels around the window are written too, unless they are
// `blank`.
template <typename A>
void paste_rows(const MaskWindow<A>& window, int64_t begin, int64_t end, int64_t width, uint8_t outside,
                bool blank, uint8_t* image) {
  const auto fill = [&](uint8_t* first, const uint8_t* last) {
    if (!blank) std::memset(first, outside, static_cast<size_t>(last - first));
  };
  const Range rows = window.lines(), columns = window.across();
  const int64_t first = std::clamp(rows.begin, begin, end), last = std::clamp(rows.end, first, end);
  fill(image + begin * width, image + first * width);
  LineCursor<A> cursor(window);
  for (int64_t y = first; y < last; ++y) {
    uint8_t* line = image + y * width;
    fill(line, line + columns.begin);
    cursor.write(y, line + columns.begin);
    fill(line + columns.end, line + width);
  }
  fill(image + last * width, image + end * width);
}

// The share of the output that is in rows with a box.
template <typename A>
double share_of_rows(const A* boxes, int64_t count, int64_t mask_height, int64_t height) {
  int64_t rows = 0;
  for (int64_t n = 0; n < count; ++n) {
    const Range window = PasteAxis<A>{boxes[n * 4 + 1], boxes[n * 4 + 3], mask_height}.window(height);
    rows += window.size();
  }
  return static_cast<double>(rows) / (static_cast<double>(count) * static_cast<double>(height));
}

template <typename A>
void paste(const A* masks, const A* boxes, int64_t count, int64_t mask_height, int64_t mask_width,
           int64_t height, int64_t width, A threshold, uint8_t* out) {
  if (count == 0 || height == 0 || width == 0) return;
  constexpr double kMostPages = 0.3;  // with a larger share of touched pages, huge pages cost less (measured)
  const PixelRule<A> rule{threshold, threshold < A(0)};
  const uint8_t outside = paste_pixel(A(0), threshold);
  const int64_t bytes = count * height * width;
  const bool blank = outside == 0 && zero_at_first_touch(out, bytes);
  if (!blank || share_of_rows(boxes, count, mask_height, height) > kMostPages) advise_huge_pages(out, bytes);
  const int64_t grain = std::max<int64_t>(1, kGrainPixels / width);
  torch::stable::parallel_for(0, count * height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin / height; n * height < end; ++n) {
      const MaskWindow<A> window(Scan::rows, masks + n * mask_height * mask_width, mask_height, mask_width,
                                 boxes + n * 4, height, width, rule);
      paste_rows(window, std::max(begin - n * height, int64_t{0}), std::min(end - n * height, height), width,
                 outside, blank, out + n * height * width);
    }
  });
}

Tensor paste_masks(const Tensor& masks_in, const Tensor& boxes_in, int64_t height, int64_t width,
                   double threshold) {
  check_paste_masks_inputs(masks_in, boxes_in, height, width, "paste_masks");
  const Tensor masks = torch::stable::contiguous(masks_in), boxes = torch::stable::contiguous(boxes_in);
  const int64_t count = masks.size(0);
  Tensor out = empty({count, height, width}, threshold < 0 ? ScalarType::Byte : ScalarType::Bool, masks);
  uint8_t* pixels = static_cast<uint8_t*>(out.mutable_data_ptr());
  dispatch_float_or_double(masks.scalar_type(), "paste_masks", [&](auto tag) {
    using A = typename decltype(tag)::type;
    paste(masks.const_data_ptr<A>(), boxes.const_data_ptr<A>(), count, masks.size(1), masks.size(2), height,
          width, static_cast<A>(threshold), pixels);
  });
  return out;
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("paste_masks", TORCH_BOX(&paste_masks));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

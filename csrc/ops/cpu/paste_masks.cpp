#include <algorithm>
#include <cstring>

#include "ops/cpu/huge_pages.h"
#include "ops/cpu/mask_window.h"

namespace panfpn {
namespace {

constexpr int64_t kGrainPixels = int64_t{1} << 17;  // per task

// Rows `begin` to `end` of one image.
template <typename A>
void paste_rows(const MaskWindow<A>& window, int64_t begin, int64_t end, int64_t width, uint8_t outside,
                uint8_t* image) {
  const PixelRange rows = window.lines(), columns = window.across();
  const int64_t first = std::clamp(rows.begin, begin, end), last = std::clamp(rows.end, first, end);
  std::memset(image + begin * width, outside, static_cast<size_t>((first - begin) * width));
  LineCursor<A> cursor(window);
  for (int64_t y = first; y < last; ++y) {
    uint8_t* line = image + y * width;
    std::memset(line, outside, static_cast<size_t>(columns.begin));
    cursor.write(y, line + columns.begin);
    std::memset(line + columns.end, outside, static_cast<size_t>(width - columns.end));
  }
  std::memset(image + last * width, outside, static_cast<size_t>((end - last) * width));
}

template <typename A>
void paste(const A* masks, const A* boxes, int64_t count, int64_t mask_height, int64_t mask_width,
           int64_t height, int64_t width, A threshold, uint8_t* out) {
  if (height == 0 || width == 0) return;
  const PixelRule<A> rule{threshold, threshold < A(0)};
  const uint8_t outside = paste_pixel(A(0), threshold);
  const int64_t grain = std::max<int64_t>(1, kGrainPixels / width);
  torch::stable::parallel_for(0, count * height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin / height; n * height < end; ++n) {
      const MaskWindow<A> window(Scan::rows, masks + n * mask_height * mask_width, mask_height, mask_width,
                                 boxes + n * 4, height, width, rule);
      paste_rows(window, std::max(begin - n * height, int64_t{0}), std::min(end - n * height, height), width,
                 outside, out + n * height * width);
    }
  });
}

Tensor paste_masks(const Tensor& masks_in, const Tensor& boxes_in, int64_t height, int64_t width,
                   double threshold) {
  check_paste_masks_inputs(masks_in, boxes_in, height, width);
  const Tensor masks = torch::stable::contiguous(masks_in), boxes = torch::stable::contiguous(boxes_in);
  const int64_t count = masks.size(0);
  Tensor out = empty({count, height, width}, threshold < 0 ? ScalarType::Byte : ScalarType::Bool, masks);
  uint8_t* pixels = static_cast<uint8_t*>(out.mutable_data_ptr());
  advise_huge_pages(pixels, count * height * width);
  dispatch_float_or_double(masks.scalar_type(), "paste_masks", [&](auto tag) {
    using A = typename decltype(tag)::type;
    paste(masks.const_data_ptr<A>(), boxes.const_data_ptr<A>(), count, masks.size(1), masks.size(2), height,
          width, static_cast<A>(threshold), pixels);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panfpn_fast, CPU, m) {
  m.impl("paste_masks", TORCH_BOX(&paste_masks));
}

}  // namespace panfpn

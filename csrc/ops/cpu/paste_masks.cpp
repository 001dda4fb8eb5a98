#include <cstring>

#include "ops/cpu/mask_window.h"

namespace panfpn {
namespace {

template <typename A>
void paste(const A* masks, const A* boxes, int64_t count, int64_t mask_height, int64_t mask_width,
           int64_t height, int64_t width, A threshold, uint8_t* out) {
  const uint8_t outside = paste_pixel(A(0), threshold);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      uint8_t* image = out + n * height * width;
      std::memset(image, outside, height * width);
      const MaskWindow<A> window(masks + n * mask_height * mask_width, mask_height, mask_width, boxes + n * 4,
                                 height, width, /*whole_image=*/false);
      for (int64_t y = window.rows().begin; y < window.rows().end; ++y) {
        uint8_t* line = image + y * width + window.columns().begin;
        window.for_row(y, [&](int64_t i, A value) { line[i] = paste_pixel(value, threshold); });
      }
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

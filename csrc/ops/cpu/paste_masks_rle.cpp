// Run lengths of pasted masks, column by column as in COCO, directly from the mask: no pixel is evaluated in
// the stretches of a column that are all off or all on.
#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "ops/cpu/mask_window.h"
#include "ops/paste_masks_rle.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// The ends of alternating runs over an image in column order; the first run is off.
class Runs {
 public:
  // Sets the pixels from `at` on to `on`, until the next call.
  void set(int64_t at, bool on) {
    if (on == on_) return;
    ends_.push_back(at);
    on_ = on;
  }

  // Returns COCO's compressed string.
  std::string encode(int64_t pixels) {
    ends_.push_back(pixels);
    std::string text;
    for (size_t i = kEarlierEnds; i < ends_.size(); ++i) {
      NumberText number(run_number(static_cast<int64_t>(i) - kEarlierEnds, &ends_[i]));
      while (number.more()) text.push_back(static_cast<char>(number.next()));
    }
    return text;
  }

 private:
  std::vector<int64_t> ends_ = std::vector<int64_t>(kEarlierEnds, 0);
  bool on_ = false;
};

// Appends the bits of one stretch. Most bits equal their neighbours, so eight at a time are compared with
// eight copies of the current one.
void add_bits(Runs& runs, int64_t at, const uint8_t* bits, int64_t count) {
  constexpr uint64_t kOnes = 0x0101010101010101;
  bool on = false;
  for (int64_t i = 0; i < count;) {
    uint64_t eight = 0;
    if (i > 0 && i + 8 <= count) {
      std::memcpy(&eight, bits + i, 8);
      if (eight == (on ? kOnes : 0)) {
        i += 8;
        continue;
      }
    }
    for (const int64_t end = std::min(i + 8, count); i < end; ++i) {
      on = bits[i] != 0;
      runs.set(at + i, on);
    }
  }
}

template <typename A>
std::string encode_mask(const MaskWindow<A>& window, int64_t height, int64_t width) {
  Runs runs;
  const Range columns = window.lines(), rows = window.across();
  LineCursor<A> cursor(window);
  std::vector<uint8_t> bits(static_cast<size_t>(rows.size()));
  for (int64_t x = columns.begin; x < columns.end; ++x) {
    const int64_t top = x * height + rows.begin;
    if (rows.begin > 0) runs.set(x * height, false);
    for (const Stretch& stretch : cursor.move_to(x)) {
      if (stretch.content == Content::mixed) {
        cursor.evaluate(stretch, bits.data());
        add_bits(runs, top + stretch.begin, bits.data(), stretch.end - stretch.begin);
      } else {
        runs.set(top + stretch.begin, stretch.content == Content::on);
      }
    }
    if (rows.end < height) runs.set(x * height + rows.end, false);
  }
  if (columns.end < width) runs.set(columns.end * height, false);
  return runs.encode(height * width);
}

std::tuple<Tensor, Tensor> paste_masks_rle(const Tensor& masks_in, const Tensor& boxes_in, int64_t height,
                                           int64_t width, double threshold) {
  check_paste_masks_inputs(masks_in, boxes_in, height, width, "paste_masks_rle");
  const Tensor masks = torch::stable::contiguous(masks_in), boxes = torch::stable::contiguous(boxes_in);
  const int64_t count = masks.size(0), mask_height = masks.size(1), mask_width = masks.size(2);
  std::vector<std::string> strings(static_cast<size_t>(count));
  dispatch_float_or_double(masks.scalar_type(), "paste_masks_rle", [&](auto tag) {
    using A = typename decltype(tag)::type;
    const PixelRule<A> rule{static_cast<A>(threshold), false};
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const MaskWindow<A> window(Scan::columns, masks.const_data_ptr<A>() + n * mask_height * mask_width,
                                   mask_height, mask_width, boxes.const_data_ptr<A>() + n * 4, height, width,
                                   rule);
        strings[n] = encode_mask(window, height, width);
      }
    });
  });

  Tensor offsets = empty({count + 1}, ScalarType::Long, masks);
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  *offset = 0;
  for (const std::string& text : strings) {
    offset[1] = offset[0] + static_cast<int64_t>(text.size());
    ++offset;
  }
  Tensor bytes = empty({*offset}, ScalarType::Byte, masks);
  uint8_t* out = bytes.mutable_data_ptr<uint8_t>();
  for (const std::string& text : strings) out = std::copy(text.begin(), text.end(), out);
  return {bytes, offsets};
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("paste_masks_rle", TORCH_BOX(&paste_masks_rle));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

#include "ops/cpu/mask_window.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/cpu/simd.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// Computes PasteAxis::taps for a range of pixels.
template <typename A>
PANFPN_VECTOR_CLONES void locate(A axis_low, A extent, A cells, int64_t first, int64_t count,
                                 int32_t* __restrict low, A* __restrict low_weight,
                                 A* __restrict high_weight) {
  for (int64_t i = 0; i < count; ++i) {
    const A normalised = (static_cast<A>(first + i) + A(0.5) - axis_low) / extent * A(2) - A(1);
    const A position = (normalised + A(1)) * (cells / A(2)) - A(0.5);
    const bool inside = position > A(-1) && position < cells;
    const A floor = std::floor(inside ? position : A(kOutside));
    low[i] = static_cast<int32_t>(floor);
    low_weight[i] = floor + A(1) - position;
    high_weight[i] = position - floor;
  }
}

template <typename A>
PANFPN_VECTOR_CLONES void pick(const A* __restrict cells, const int32_t* __restrict low, int64_t count,
                               A* __restrict before, A* __restrict after) {
  for (int64_t i = 0; i < count; ++i) {
    before[i] = cells[low[i]];
    after[i] = cells[low[i] + 1];
  }
}

// The four cells around each pixel of a stretch, and the weights along the line. The names refer to the image
// in both scan directions, since the order of the sum in `interpolate` decides the last bit.
template <typename A>
struct Cells {
  const A *top_left, *top_right, *bottom_left, *bottom_right;
  const A *low_weight, *high_weight;
};

template <typename A>
PANFPN_VECTOR_CLONES void row_bits(const Cells<A>& cells, const PasteTaps<A>& row, A threshold, int64_t count,
                                   uint8_t* __restrict out) {
  const A *__restrict a = cells.top_left, *__restrict b = cells.top_right, *__restrict c = cells.bottom_left,
          *__restrict d = cells.bottom_right;
  const A* __restrict low = cells.low_weight, * __restrict high = cells.high_weight;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = interpolate(a[i], b[i], c[i], d[i], row, PasteTaps<A>{0, low[i], high[i]}) >= threshold;
  }
}

template <typename A>
PANFPN_VECTOR_CLONES void column_bits(const Cells<A>& cells, const PasteTaps<A>& column, A threshold,
                                      int64_t count, uint8_t* __restrict out) {
  const A *__restrict a = cells.top_left, *__restrict b = cells.top_right, *__restrict c = cells.bottom_left,
          *__restrict d = cells.bottom_right;
  const A* __restrict low = cells.low_weight, * __restrict high = cells.high_weight;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = interpolate(a[i], b[i], c[i], d[i], PasteTaps<A>{0, low[i], high[i]}, column) >= threshold;
  }
}

template <typename A>
PANFPN_VECTOR_CLONES void row_bytes(const Cells<A>& cells, const PasteTaps<A>& row, int64_t count,
                                    uint8_t* __restrict out) {
  const A *__restrict a = cells.top_left, *__restrict b = cells.top_right, *__restrict c = cells.bottom_left,
          *__restrict d = cells.bottom_right;
  const A* __restrict low = cells.low_weight, * __restrict high = cells.high_weight;
  for (int64_t i = 0; i < count; ++i) {
    const A value = interpolate(a[i], b[i], c[i], d[i], row, PasteTaps<A>{0, low[i], high[i]});
    out[i] = paste_pixel(value, A(-1));
  }
}

}  // namespace

template <typename A>
void AxisTaps<A>::fill(const PasteAxis<A>& axis, Range range, bool degenerate) {
  pixels = range;
  const size_t count = static_cast<size_t>(size());
  low.assign(count, kOutside);
  low_weight.resize(count);
  high_weight.resize(count);
  if (!degenerate) {
    locate(axis.low, axis.high - axis.low, static_cast<A>(axis.mask_size), range.begin, size(), low.data(),
           low_weight.data(), high_weight.data());
  }
  for (int64_t i = 0; i < size(); ++i) {
    if (runs.empty() || runs.back().cell != low[i]) runs.push_back({i, i, low[i]});
    runs.back().end = i + 1;
  }
}

template <typename A>
MaskWindow<A>::MaskWindow(Scan scan, const A* mask, int64_t mask_height, int64_t mask_width, const A* box,
                          int64_t image_height, int64_t image_width, const PixelRule<A>& rule)
    : scan_(scan), rule_(rule) {
  const PasteAxis<A> y{box[1], box[3], mask_height}, x{box[0], box[2], mask_width};
  const bool whole = rule.zero_is_on();
  const Range rows = whole ? Range{0, image_height} : y.window(image_height);
  const Range columns = whole ? Range{0, image_width} : x.window(image_width);
  const bool nothing = mask_height == 0 || mask_width == 0 || y.degenerate() || x.degenerate();
  if (rows.begin == rows.end || columns.begin == columns.end || (nothing && !whole)) return;
  const bool by_rows = scan == Scan::rows;
  outer_.fill(by_rows ? y : x, by_rows ? rows : columns, nothing);
  inner_.fill(by_rows ? x : y, by_rows ? columns : rows, nothing);

  stride_ = (by_rows ? mask_width : mask_height) + 2;
  padded_.assign(static_cast<size_t>(((by_rows ? mask_height : mask_width) + 2) * stride_), A(0));
  for (int64_t i = 0; i < mask_height; ++i) {
    const A* line = mask + i * mask_width;
    if (by_rows) {
      std::copy(line, line + mask_width, padded_.begin() + (i + 1) * stride_ + 1);
    } else {
      for (int64_t j = 0; j < mask_width; ++j) padded_[(j + 1) * stride_ + i + 1] = line[j];
    }
  }
}

// Rounding moves a mean of four values by less than 1e-6 times the largest: the two weights of an axis add up
// to one within 2^-23, and each term is rounded four times. The margin is ten times that; its second term
// covers values so small that they lose bits. Cells with NaN or infinity are mixed.
template <typename A>
Content LineCursor<A>::classify(int32_t line, int32_t cell) const {
  const PixelRule<A>& rule = window_.rule_;
  if (cell == kOutside) return rule.zero_is_on() ? Content::on : Content::off;
  const A* near = window_.padded_.data() + (line + 1) * window_.stride_ + cell + 1;
  const A* far = near + window_.stride_;
  const auto [smallest, largest] = std::minmax({near[0], near[1], far[0], far[1]});
  const A reach = std::fabs(near[0]) + std::fabs(near[1]) + std::fabs(far[0]) + std::fabs(far[1]);
  if (rule.bytes) return reach == A(0) ? Content::off : Content::mixed;
  const A margin = A(1e-5) * reach + A(1e-30);
  if (!std::isfinite(margin)) return Content::mixed;
  if (smallest - margin > rule.threshold) return Content::on;
  return largest + margin < rule.threshold ? Content::off : Content::mixed;
}

template <typename A>
const std::vector<Stretch>& LineCursor<A>::move_to(int64_t line) {
  index_ = line - window_.outer_.pixels.begin;
  const int32_t cell = window_.outer_.low[index_];
  if (cell == cell_) return stretches_;
  cell_ = cell;
  stretches_.clear();
  if (cell == kOutside) {
    stretches_.push_back({0, window_.inner_.size(), classify(0, cell)});
    return stretches_;
  }
  for (const auto& run : window_.inner_.runs) {
    const Content content = classify(cell, run.cell);
    if (!stretches_.empty() && stretches_.back().content == content) {
      stretches_.back().end = run.end;
    } else {
      stretches_.push_back({run.begin, run.end, content});
    }
  }
  expand();
  return stretches_;
}

template <typename A>
void LineCursor<A>::expand() {
  const AxisTaps<A>& inner = window_.inner_;
  const A* near = window_.padded_.data() + (cell_ + 1) * window_.stride_ + 1;
  for (auto* taps : {near_, far_}) {
    for (int side = 0; side < 2; ++side) taps[side].resize(static_cast<size_t>(inner.size()));
  }
  for (const Stretch& stretch : stretches_) {
    if (stretch.content != Content::mixed) continue;
    const int64_t at = stretch.begin, count = stretch.end - stretch.begin;
    pick(near, inner.low.data() + at, count, near_[0].data() + at, near_[1].data() + at);
    pick(near + window_.stride_, inner.low.data() + at, count, far_[0].data() + at, far_[1].data() + at);
  }
}

template <typename A>
void LineCursor<A>::evaluate(const Stretch& stretch, uint8_t* out) const {
  const AxisTaps<A>&outer = window_.outer_, &inner = window_.inner_;
  const PasteTaps<A> line{cell_, outer.low_weight[index_], outer.high_weight[index_]};
  const int64_t at = stretch.begin, count = stretch.end - stretch.begin;
  const A *low = inner.low_weight.data() + at, *high = inner.high_weight.data() + at;
  const A *a = near_[0].data() + at, *b = near_[1].data() + at;
  const A *c = far_[0].data() + at, *d = far_[1].data() + at;
  if (window_.scan_ == Scan::columns) {
    column_bits<A>({a, c, b, d, low, high}, line, window_.rule_.threshold, count, out);
  } else if (window_.rule_.bytes) {
    row_bytes<A>({a, b, c, d, low, high}, line, count, out);
  } else {
    row_bits<A>({a, b, c, d, low, high}, line, window_.rule_.threshold, count, out);
  }
}

template <typename A>
void LineCursor<A>::write(int64_t line, uint8_t* out) {
  for (const Stretch& stretch : move_to(line)) {
    if (stretch.content == Content::mixed) {
      evaluate(stretch, out + stretch.begin);
    } else {
      std::memset(out + stretch.begin, stretch.content == Content::on,
                  static_cast<size_t>(stretch.end - stretch.begin));
    }
  }
}

template class MaskWindow<float>;
template class MaskWindow<double>;
template class LineCursor<float>;
template class LineCursor<double>;

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// The samples of a bin form a grid, the product of its rows and columns, and the bilinear weights are
// products too. So each axis is folded first: the weights of all samples that touch a row (or column) of
// pixels are added up. A bin becomes a weighted sum over a few pixels, and each is read once instead of once
// for each sample.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>
#include <vector>

#include "ops/roi_align.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// The pixels along one axis that contribute to each bin, with the summed weights of their samples.
template <typename A>
class AxisFold {
 public:
  struct Entry {
    int32_t slot;  // index in pixels()
    A weight;
  };

  void fold(const RoiAxis<A>& axis, int64_t bins, int64_t size) {
    pixels_.clear();
    entries_.clear();
    starts_.assign(1, 0);
    const bool ascending = axis.bin >= A(0);
    for (int64_t bin = 0; bin < bins; ++bin) {
      if (axis.grid > 0) {
        const Range range = samples_on_map(axis, bin, size);
        for (int64_t i = range.begin; i < range.end; ++i) {
          const Taps<A> taps = bilinear_taps(axis.sample(bin, i), size);
          if (!taps.valid) continue;
          const bool two = taps.high_weight != A(0);
          // In the order of the samples, so that the slots follow the order of the axis.
          if (two && !ascending) add(taps.high, taps.high_weight, ascending);
          add(taps.low, taps.low_weight, ascending);
          if (two && ascending) add(taps.high, taps.high_weight, ascending);
        }
      }
      starts_.push_back(entries_.size());
    }
  }

  // The pixels that any bin touches, in the order of the axis.
  const std::vector<int64_t>& pixels() const { return pixels_; }
  const Entry* begin(int64_t bin) const { return entries_.data() + starts_[bin]; }
  const Entry* end(int64_t bin) const { return entries_.data() + starts_[bin + 1]; }

 private:
  // Samples come in order, so a pixel that was added before is near the end of the list. If rounding breaks
  // this order, a pixel is listed twice, which only costs time.
  void add(int64_t pixel, A weight, bool ascending) {
    size_t slot = pixels_.size();
    while (slot > 0 && (ascending ? pixels_[slot - 1] > pixel : pixels_[slot - 1] < pixel)) --slot;
    if (slot > 0 && pixels_[slot - 1] == pixel) {
      --slot;
    } else {
      slot = pixels_.size();
      pixels_.push_back(pixel);
    }
    for (size_t i = entries_.size(); i > starts_.back() && i + 3 > entries_.size(); --i) {
      if (entries_[i - 1].slot == static_cast<int32_t>(slot)) {
        entries_[i - 1].weight += weight;
        return;
      }
    }
    entries_.push_back({static_cast<int32_t>(slot), weight});
  }

  std::vector<int64_t> pixels_;
  std::vector<Entry> entries_;
  std::vector<size_t> starts_;
};

// One box: its feature map, and the folded pixels of its bins.
template <typename A>
struct BoxFold {
  bool usable = false;  // false: all bins are zero
  int level = 0;
  int64_t image = 0;
  A samples = 1;  // in a bin; sums are divided by it, which gives exactly 0.5 for a mask on half of them
  AxisFold<A> rows, columns;

  void fold(const A* box, const PyramidShape& shape, const RoiAlignParams& params) {
    usable = false;
    level = level_of_box(params.rule, shape.levels, box[1], box[2], box[3], box[4]);
    const int64_t height = shape.height[level], width = shape.width[level];
    const bool in_batch = box[0] >= A(0) && box[0] < static_cast<A>(shape.batch);  // false for NaN
    if (!in_batch || height == 0 || width == 0) return;
    image = static_cast<int64_t>(box[0]);
    const A map_scale = static_cast<A>(shape.scale[level]);
    const RoiAxis<A> y =
        make_roi_axis(box[2], box[4], map_scale, params.pooled_height, params.sampling_ratio, params.aligned);
    const RoiAxis<A> x =
        make_roi_axis(box[1], box[3], map_scale, params.pooled_width, params.sampling_ratio, params.aligned);
    if (y.grid <= 0 || x.grid <= 0) return;
    rows.fold(y, params.pooled_height, height);
    columns.fold(x, params.pooled_width, width);
    usable = !rows.pixels().empty() && !columns.pixels().empty();
    samples = static_cast<A>(y.grid) * static_cast<A>(x.grid);
  }
};

// The folds of all boxes. They are computed once and kept if there are few enough boxes; otherwise each use
// computes them again.
template <typename A>
class BoxFolds {
 public:
  BoxFolds(const A* boxes, int64_t count, const PyramidShape& shape, const RoiAlignParams& params)
      : boxes_(boxes), count_(count), shape_(shape), params_(params) {
    constexpr int64_t kKept = 16384;
    if (count > kKept) return;
    kept_.resize(count);
    torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) kept_[k].fold(boxes_ + k * 5, shape_, params_);
    });
  }

  const BoxFold<A>& get(int64_t k, BoxFold<A>& scratch) const {
    if (!kept_.empty()) return kept_[k];
    scratch.fold(boxes_ + k * 5, shape_, params_);
    return scratch;
  }

  // The boxes of one image on one level, from top to bottom, so that the map stays in the cache.
  struct Group {
    int64_t image;
    int level;
    std::vector<int64_t> boxes;
    int64_t top, bottom, left, right;  // half-open ranges of the pixels that they touch
  };

  // Groups all boxes that touch a pixel by level and image.
  std::vector<Group> groups() const {
    struct Key {
      uint64_t map;
      int64_t row, column, box;
      bool operator<(const Key& other) const {
        return std::tie(map, row, column, box) < std::tie(other.map, other.row, other.column, other.box);
      }
    };
    constexpr int64_t kTile = 16;
    std::vector<Key> keys(count_);
    std::vector<std::array<int64_t, 4>> edges(count_);
    constexpr uint64_t kNoMap = std::numeric_limits<uint64_t>::max();
    torch::stable::parallel_for(0, count_, 16, [&](int64_t begin, int64_t end) {
      BoxFold<A> scratch;
      for (int64_t k = begin; k < end; ++k) {
        const BoxFold<A>& box = get(k, scratch);
        keys[k] = {kNoMap, 0, 0, k};
        if (!box.usable) continue;
        const auto rows = std::minmax_element(box.rows.pixels().begin(), box.rows.pixels().end());
        const auto columns = std::minmax_element(box.columns.pixels().begin(), box.columns.pixels().end());
        edges[k] = {*rows.first, *rows.second + 1, *columns.first, *columns.second + 1};
        keys[k] = {static_cast<uint64_t>(box.level) * static_cast<uint64_t>(shape_.batch) +
                       static_cast<uint64_t>(box.image),
                   *rows.first / kTile, *columns.first / kTile, k};
      }
    });
    std::sort(keys.begin(), keys.end());
    std::vector<Group> groups;
    uint64_t map = kNoMap;
    for (const Key& key : keys) {
      if (key.map == kNoMap) break;
      const auto& [top, bottom, left, right] = edges[key.box];
      if (key.map != map) {
        map = key.map;
        groups.push_back({static_cast<int64_t>(map % static_cast<uint64_t>(shape_.batch)),
                          static_cast<int>(map / static_cast<uint64_t>(shape_.batch)),
                          {},
                          top,
                          bottom,
                          left,
                          right});
      }
      Group& group = groups.back();
      group.boxes.push_back(key.box);
      group.top = std::min(group.top, top);
      group.bottom = std::max(group.bottom, bottom);
      group.left = std::min(group.left, left);
      group.right = std::max(group.right, right);
    }
    return groups;
  }

 private:
  const A* boxes_;
  int64_t count_;
  const PyramidShape& shape_;
  const RoiAlignParams& params_;
  std::vector<BoxFold<A>> kept_;
};

}  // namespace panfpn::inline PANFPN_ARITHMETIC

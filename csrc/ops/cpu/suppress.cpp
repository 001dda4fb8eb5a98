// Boxes are visited by descending score. Each is compared with the boxes kept so far, and is kept unless one
// of them suppresses it. So the work is proportional to the number of kept boxes, and ends when enough boxes
// are kept.
//
// Kept boxes are stored in buckets, one for each group and each octave of area: an IoU above t needs areas
// within a factor of t, so only a few buckets need to be searched. The coordinates are in separate arrays, so
// that the comparison with a run of boxes vectorises. A first comparison, without a division, finds whether
// any box of the run could be above the threshold; if so, the IoU itself decides, in the peer's order of
// operations.
#include "ops/suppress.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "ops/cpu/score_order.h"
#include "ops/cpu/simd.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// Buckets are padded to multiples of this: the floats of an AVX-512 register.
constexpr int64_t kLanes = 16;
// Kept boxes that are compared before testing whether any of them suppresses the candidate.
constexpr int64_t kRun = 8 * kLanes;
// In groups with fewer boxes, a division by area costs more than it saves.
constexpr int64_t kSplitByArea = 256;
constexpr int64_t kMostOctaves = 16;
// The number of comparisons, one or two milliseconds, that justify waking other threads: on a busy machine,
// waiting for a thread costs a time slice. One thread processes ten thousand boxes in a few milliseconds.
constexpr int64_t kParallelWork = int64_t{1} << 22;
// The safety margin of the first comparison, 2^-18, is larger than its rounding errors of about 2^-24.
constexpr double kMargin = 1.0 - 1.0 / (1 << 18);

// The boxes of one image, checked and contiguous.
struct Candidates {
  const void* boxes;  // [count, 4], float32 or float64
  ScalarType box_dtype;
  const void* scores;  // [count], float32 or float64
  ScalarType score_dtype;
  const int64_t* idxs;  // [count]; null if all boxes are in one group
  int64_t count;
};

// A threshold, prepared for boxes of type T.
template <typename T>
struct Threshold {
  T value;      // the IoU that the comparison itself uses
  double part;  // an intersection above the threshold exceeds this part of the sum of both areas
  T ratio;      // the smaller area must exceed this part of the larger
  bool prunes;  // if false, every box may suppress every other: disjoint boxes have an IoU of 0
};

// The peer's CPU op compares a float32 IoU with a double threshold. The same comparison in T needs the
// threshold rounded down: any T above the largest T that does not exceed the threshold exceeds the threshold
// itself.
template <typename T>
T round_down(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return static_cast<double>(rounded) > threshold
             ? std::nextafter(rounded, -std::numeric_limits<T>::infinity())
             : rounded;
}

template <typename T>
Threshold<T> prepare(double iou_threshold) {
  const T value = round_down<T>(iou_threshold);
  const double exact = value;
  return {value, kMargin / (1.0 + 1.0 / exact), static_cast<T>(exact * kMargin), exact >= 0.0};
}

// A box's share of the least intersection above the threshold: inter / (a + b - inter) > t implies inter > t
// / (1 + t) * (a + b), and each box contributes its area's part of that sum. A share too small to be exact is
// set to 0.
template <typename T>
T share_of(T area, const Threshold<T>& threshold) {
  const T share = static_cast<T>(threshold.part * area);
  return share >= T(1e-30) ? share : T(0);
}

// Returns whether the box can suppress others at all. If disjoint boxes do not suppress each other, a box
// without a positive finite area neither suppresses nor is suppressed: its intersections are empty, or its
// IoU is 0 or NaN. NaN coordinates give a NaN area.
template <typename T>
bool is_active(const Box<T>& box, T area, const Threshold<T>& threshold) {
  return !threshold.prunes ||
         (box.x2 > box.x1 && box.y2 > box.y1 && area > T(0) && area < std::numeric_limits<T>::infinity());
}

// Grows with the logarithm of a positive area.
template <typename T>
int64_t octave(T area) {
  if constexpr (sizeof(T) == 4) {
    return std::bit_cast<uint32_t>(area) >> 23;
  } else {
    return static_cast<int64_t>(std::bit_cast<uint64_t>(area) >> 52);
  }
}

// Boxes as separate arrays.
template <typename T>
struct Columns {
  T *x1, *y1, *x2, *y2, *area, *share;
};

template <typename T>
struct Candidate {
  Box<T> box;
  T area, share;
};

// Returns whether any of the kept boxes [begin, end) might be above the threshold; `end - begin` is a
// multiple of kLanes. Empty intersections are at or below zero here, and the candidate's share is above zero.
template <typename T>
PANFPN_VECTOR_CLONES bool some_near(const Columns<T>& kept, int64_t begin, int64_t end,
                                    const Candidate<T>& c) {
  using Mask = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const T *x1 = kept.x1 + begin, *y1 = kept.y1 + begin, *x2 = kept.x2 + begin, *y2 = kept.y2 + begin;
  const T* share = kept.share + begin;
  const T cx1 = c.box.x1, cy1 = c.box.y1, cx2 = c.box.x2, cy2 = c.box.y2, c_share = c.share;
  const int64_t count = (end - begin) / kLanes * kLanes;
  Mask near = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T left = cx1 > x1[i] ? cx1 : x1[i], right = cx2 < x2[i] ? cx2 : x2[i];
    const T top = cy1 > y1[i] ? cy1 : y1[i], bottom = cy2 < y2[i] ? cy2 : y2[i];
    const T width = right - left, height = bottom - top;
    const T inter = (T(0) > width ? T(0) : width) * height;
    near |= inter >= share[i] + c_share ? Mask(-1) : Mask(0);
  }
  return near != 0;
}

// Returns whether any of the kept boxes [begin, end) is above the threshold.
template <typename T>
PANFPN_VECTOR_CLONES bool some_above(const Columns<T>& kept, int64_t begin, int64_t end,
                                     const Candidate<T>& c, T threshold) {
  using Mask = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const int64_t count = (end - begin) / kLanes * kLanes;
  const Candidate<T> candidate = c;
  Mask above = 0;
  for (int64_t i = begin; i < begin + count; ++i) {
    const Box<T> other{kept.x1[i], kept.y1[i], kept.x2[i], kept.y2[i]};
    const T inter = intersection(other, candidate.box);
    above |= inter / (kept.area[i] + candidate.area - inter) > threshold ? Mask(-1) : Mask(0);
  }
  return above != 0;
}

int64_t round_up(int64_t value) {
  return (value + kLanes - 1) / kLanes * kLanes;
}

// Numbers the groups from 0 and returns how many there are.
int64_t number_groups(const int64_t* idxs, int64_t count, uint32_t* group) {
  const auto [low, high] = std::minmax_element(idxs, idxs + count);
  const uint64_t range = static_cast<uint64_t>(*high) - static_cast<uint64_t>(*low);
  if (range < static_cast<uint64_t>(count) + kSplitByArea) {  // few enough values for one bucket each
    for (int64_t i = 0; i < count; ++i) group[i] = static_cast<uint32_t>(idxs[i] - *low);
    return static_cast<int64_t>(range) + 1;
  }
  std::vector<int64_t> values(idxs, idxs + count);
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  for (int64_t i = 0; i < count; ++i) {
    group[i] =
        static_cast<uint32_t>(std::lower_bound(values.begin(), values.end(), idxs[i]) - values.begin());
  }
  return static_cast<int64_t>(values.size());
}

struct Bucket {
  int64_t begin = 0, end = 0;  // the kept boxes so far
  int64_t before = 0;          // `end` before the candidates of `block` were visited
  int64_t block = -1;
};

template <typename T>
class Suppression {
 public:
  Suppression(const Candidates& candidates, double iou_threshold)
      : boxes_(static_cast<const Box<T>*>(candidates.boxes)),
        count_(candidates.count),
        threshold_(prepare<T>(iou_threshold)),
        order_(std::make_unique_for_overwrite<uint32_t[]>(count_)),
        group_(count_) {
    order_by_score(candidates.scores, candidates.score_dtype, count_, order_.get());
    const int64_t groups =
        candidates.idxs != nullptr ? number_groups(candidates.idxs, count_, group_.data()) : 1;
    make_buckets(groups);
  }

  int64_t run(int64_t max_output, int64_t* keep) {
    const int64_t block_size = std::clamp<int64_t>(count_ / 16, 64, 1024);
    std::vector<uint8_t> suppressed(block_size);
    int64_t kept = 0;
    for (int64_t first = 0, block = 0; first < count_ && kept < max_output; first += block_size, ++block) {
      const int64_t last = std::min(first + block_size, count_);
      // Against the boxes kept before the block, its candidates can be compared independently of each other.
      const int64_t buckets = static_cast<int64_t>(buckets_.size());
      const bool in_parallel = (last - first) * (kept / std::max<int64_t>(buckets / 3, 1)) > kParallelWork;
      if (in_parallel) {
        torch::stable::parallel_for(first, last, block_size / 16, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) suppressed[i - first] = is_suppressed(order_[i], -1);
        });
      }
      for (int64_t i = first; i < last && kept < max_output; ++i) {
        const int64_t index = order_[i];
        if (in_parallel ? suppressed[i - first] || is_suppressed(index, block) : is_suppressed(index, -1))
          continue;
        add(index, block);
        keep[kept++] = index;
      }
    }
    return kept;
  }

 private:
  void make_buckets(int64_t groups) {
    octaves_ = 1;
    if (threshold_.ratio > T(1e-30) && threshold_.prunes && count_ / groups > kSplitByArea) {
      int64_t low = std::numeric_limits<int64_t>::max(), high = 0;
      for (int64_t i = 0; i < count_; ++i) {
        const T area = box_area(boxes_[i]);
        if (!is_active(boxes_[i], area, threshold_)) continue;
        low = std::min(low, octave(area));
        high = std::max(high, octave(area));
      }
      lowest_octave_ = low;
      if (low < high) octaves_ = std::min(high - low + 1, kMostOctaves);
    }
    std::vector<int64_t> members(groups * octaves_, 0);
    for (int64_t i = 0; i < count_; ++i) ++members[bucket_of(i, box_area(boxes_[i]))];
    buckets_.resize(members.size());
    int64_t capacity = 0;
    for (size_t i = 0; i < members.size(); ++i) {
      buckets_[i].begin = buckets_[i].end = capacity;
      capacity += round_up(members[i]);
    }
    memory_.reset(static_cast<T*>(::operator new[](6 * capacity * sizeof(T), kAlignment)));
    T* column = memory_.get();
    for (T** start : {&kept_.x1, &kept_.y1, &kept_.x2, &kept_.y2, &kept_.area, &kept_.share}) {
      *start = column;
      column += capacity;
    }
  }

  int64_t octave_within(T area) const {
    return std::clamp<int64_t>(octave(area) - lowest_octave_, 0, octaves_ - 1);
  }

  int64_t bucket_of(int64_t index, T area) const {
    return group_[index] * octaves_ + (octaves_ > 1 && area > T(0) ? octave_within(area) : 0);
  }

  // Compares with all kept boxes, or, if `block` is not negative, with those of the current block of
  // candidates.
  bool is_suppressed(int64_t index, int64_t block) const {
    const Box<T> box = boxes_[index];
    const T area = box_area(box);
    if (!is_active(box, area, threshold_)) return false;
    // The share must be above zero, see some_near, even if the area's share was too small to count.
    const T share = std::max(share_of(area, threshold_), std::numeric_limits<T>::denorm_min());
    const Candidate<T> candidate{box, area, share};
    int64_t low = group_[index] * octaves_, high = low;
    if (octaves_ > 1) {
      high += octave_within(area / threshold_.ratio);
      low += octave_within(area * threshold_.ratio);
    }
    for (int64_t b = low; b <= high; ++b) {
      const Bucket& bucket = buckets_[b];
      int64_t begin = bucket.begin;
      if (block >= 0) begin = bucket.block == block ? bucket.before / kLanes * kLanes : bucket.end;
      const int64_t end = bucket.begin + round_up(bucket.end - bucket.begin);
      for (; begin < end; begin += kRun) {
        const int64_t run_end = std::min(begin + kRun, end);
        if ((!threshold_.prunes || some_near(kept_, begin, run_end, candidate)) &&
            some_above(kept_, begin, run_end, candidate, threshold_.value)) {
          return true;
        }
      }
    }
    return false;
  }

  void add(int64_t index, int64_t block) {
    const Box<T> box = boxes_[index];
    const T area = box_area(box);
    if (!is_active(box, area, threshold_)) return;
    Bucket& bucket = buckets_[bucket_of(index, area)];
    if (bucket.block != block) {
      bucket.block = block;
      bucket.before = bucket.end;
    }
    const int64_t at = bucket.end++;
    if ((at - bucket.begin) % kLanes ==
        0) {  // entries that are compared but not yet filled must not suppress
      for (T* column : {kept_.x1, kept_.y1, kept_.x2, kept_.y2}) std::fill_n(column + at, kLanes, T(0));
      std::fill_n(kept_.area + at, kLanes, std::numeric_limits<T>::quiet_NaN());
      std::fill_n(kept_.share + at, kLanes, std::numeric_limits<T>::infinity());
    }
    kept_.x1[at] = box.x1, kept_.y1[at] = box.y1, kept_.x2[at] = box.x2, kept_.y2[at] = box.y2;
    kept_.area[at] = area, kept_.share[at] = share_of(area, threshold_);
  }

  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* memory) const { ::operator delete[](memory, kAlignment); }
  };

  const Box<T>* boxes_;
  int64_t count_;
  Threshold<T> threshold_;
  std::unique_ptr<uint32_t[]> order_;
  std::vector<uint32_t> group_;
  int64_t octaves_ = 1, lowest_octave_ = 0;
  std::vector<Bucket> buckets_;
  std::unique_ptr<T[], Free> memory_;
  Columns<T> kept_{};
};

// Writes the indices of the kept boxes by descending score, at most `max_output`; returns how many.
int64_t suppress_image(const Candidates& candidates, double iou_threshold, int64_t max_output,
                       int64_t* keep) {
  if (candidates.count == 0 || max_output <= 0) return 0;
  STD_TORCH_CHECK(candidates.count <= std::numeric_limits<uint32_t>::max(),
                  "nms: at most 2^32 - 1 boxes are supported, got ", candidates.count);
  int64_t kept = 0;
  dispatch_float_or_double(candidates.box_dtype, "nms", [&](auto tag) {
    using T = typename decltype(tag)::type;
    kept = Suppression<T>(candidates, iou_threshold).run(max_output, keep);
  });
  return kept;
}

}  // namespace

std::pair<Tensor, Tensor> suppress(const Tensor& boxes_in, const Tensor& scores_in, const Tensor* idxs_in,
                                   double iou_threshold, int64_t max_output) {
  const Tensor boxes = torch::stable::contiguous(boxes_in), scores = torch::stable::contiguous(scores_in);
  const Tensor idxs = idxs_in != nullptr ? torch::stable::contiguous(*idxs_in) : scores;
  const auto [keep, kept_count] = empty_padded(boxes, max_output);
  int64_t* const kept = keep.mutable_data_ptr<int64_t>();
  int64_t* const counts = kept_count.mutable_data_ptr<int64_t>();
  const bool batched = boxes.dim() == 3;
  const int64_t images = batched ? boxes.size(0) : 1, count = boxes.size(batched ? 1 : 0);
  const auto* box_bytes = static_cast<const char*>(boxes.const_data_ptr());
  const auto* score_bytes = static_cast<const char*>(scores.const_data_ptr());
  const int64_t box_stride = count * 4 * boxes.element_size(), score_stride = count * scores.element_size();
  const int64_t* const groups = idxs_in != nullptr ? idxs.const_data_ptr<int64_t>() : nullptr;
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Candidates candidates{box_bytes + i * box_stride,
                                  boxes.scalar_type(),
                                  score_bytes + i * score_stride,
                                  scores.scalar_type(),
                                  groups != nullptr ? groups + i * count : nullptr,
                                  count};
      counts[i] = suppress_image(candidates, iou_threshold, max_output, kept + i * max_output);
      std::fill(kept + i * max_output + counts[i], kept + (i + 1) * max_output, int64_t{-1});
    }
  };
  constexpr int64_t kBoxesWorthAThread = 1024;
  if (images == 1) {
    run(0, 1);  // outside of parallel_for, so that suppress_image can use all threads
  } else {
    torch::stable::parallel_for(0, images, kBoxesWorthAThread / std::max<int64_t>(count, 1) + 1, run);
  }
  return {keep, kept_count};
}

Tensor suppress_all(const Tensor& boxes_in, const Tensor& scores_in, const Tensor* idxs_in,
                    double iou_threshold) {
  const Tensor boxes = torch::stable::contiguous(boxes_in), scores = torch::stable::contiguous(scores_in);
  const Tensor idxs = idxs_in != nullptr ? torch::stable::contiguous(*idxs_in) : scores;
  const int64_t count = boxes.size(0);
  const auto keep = std::make_unique_for_overwrite<int64_t[]>(count);
  const int64_t kept = suppress_image(
      {boxes.const_data_ptr(), boxes.scalar_type(), scores.const_data_ptr(), scores.scalar_type(),
       idxs_in != nullptr ? idxs.const_data_ptr<int64_t>() : nullptr, count},
      iou_threshold, count, keep.get());
  Tensor out = empty({kept}, ScalarType::Long, boxes);
  std::copy_n(keep.get(), kept, out.mutable_data_ptr<int64_t>());
  return out;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

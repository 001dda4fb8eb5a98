// Boxes in score order are resolved 64 at a time: first among themselves, one after the other, then the
// survivors strike out everything behind them in parallel. Coordinates lie in separate arrays, so the inner
// loop vectorises.
#include "ops/cpu/suppress.h"

#include <algorithm>
#include <vector>

namespace panfpn {
namespace {

constexpr int64_t kBlock = 64;
// Boxes struck out per task: below that a task costs more than it saves.
constexpr int64_t kGrain = 512;

template <typename T>
struct SortedBoxes {
  std::vector<T> x1, y1, x2, y2;
  std::vector<uint8_t> suppressed;

  SortedBoxes(const T* boxes, const int64_t* order, int64_t count)
      : x1(count), y1(count), x2(count), y2(count), suppressed(count, 0) {
    for (int64_t i = 0; i < count; ++i) {
      const T* box = boxes + order[i] * 4;
      x1[i] = box[0], y1[i] = box[1], x2[i] = box[2], y2[i] = box[3];
    }
  }

  Box<T> at(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }

  void strike(int64_t by, int64_t begin, int64_t end, T threshold) {
    const Box<T> a = at(by);
    const T *px1 = x1.data(), *py1 = y1.data(), *px2 = x2.data(), *py2 = y2.data();
    uint8_t* out = suppressed.data();
    for (int64_t j = begin; j < end; ++j) {
      out[j] |= iou_above(a, Box<T>{px1[j], py1[j], px2[j], py2[j]}, threshold);
    }
  }
};

// Marks in `keep` the members of `order` (one group, by descending score) that survive.
template <typename T>
void suppress_group(const T* boxes, const int64_t* order, int64_t count, T threshold, uint8_t* keep) {
  SortedBoxes<T> sorted(boxes, order, count);
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t block_end = std::min(block + kBlock, count);
    for (int64_t i = block; i < block_end; ++i) {
      if (!sorted.suppressed[i]) sorted.strike(i, i + 1, block_end, threshold);
    }
    torch::stable::parallel_for(block_end, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = block; i < block_end; ++i) {
        if (!sorted.suppressed[i]) sorted.strike(i, begin, end, threshold);
      }
    });
  }
  for (int64_t i = 0; i < count; ++i) keep[order[i]] = !sorted.suppressed[i];
}

// The comparison `float32 IoU > double threshold` of the peer's CPU op, as a comparison in T: the threshold
// rounded down, since a T above the largest T not over the threshold is above the threshold itself.
template <typename T>
T round_down(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return static_cast<double>(rounded) > threshold
             ? std::nextafter(rounded, -std::numeric_limits<T>::infinity())
             : rounded;
}

}  // namespace

Tensor suppress(const Tensor& boxes_in, const Tensor& scores, const int64_t* idxs, double iou_threshold) {
  const Tensor boxes = torch::stable::contiguous(boxes_in);
  const Tensor order_tensor = argsort(scores, /*descending=*/true);
  const int64_t count = boxes.size(0);
  const int64_t* order = order_tensor.const_data_ptr<int64_t>();
  std::vector<uint8_t> keep(count, 0);

  // Groups lie one after the other in `grouped`, each still by descending score.
  std::vector<int64_t> grouped(order, order + count), starts;
  if (idxs != nullptr) {
    std::stable_sort(grouped.begin(), grouped.end(), [&](int64_t a, int64_t b) { return idxs[a] < idxs[b]; });
  }
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || (idxs != nullptr && idxs[grouped[i]] != idxs[grouped[i - 1]])) starts.push_back(i);
  }
  const int64_t groups = static_cast<int64_t>(starts.size());
  starts.push_back(count);

  dispatch_float_or_double(boxes.scalar_type(), "nms", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* data = boxes.const_data_ptr<T>();
    const T threshold = round_down<T>(iou_threshold);
    auto run = [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        suppress_group(data, grouped.data() + starts[g], starts[g + 1] - starts[g], threshold, keep.data());
      }
    };
    if (groups == 1) {
      run(0, 1);  // outside a parallel region, so that the group itself is worked on in parallel
    } else {
      torch::stable::parallel_for(0, groups, 1, run);
    }
  });

  const int64_t kept = std::count(keep.begin(), keep.end(), uint8_t{1});
  Tensor out = empty({kept}, ScalarType::Long, boxes);
  std::copy_if(order, order + count, out.mutable_data_ptr<int64_t>(),
               [&](int64_t i) { return keep[i] != 0; });
  return out;
}

}  // namespace panfpn

// One bin of one box, as a warp computes it: the pixels that it averages, and their weights.
#pragma once

#include "ops/cuda/launch.cuh"
#include "ops/roi_align.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

// V neighbouring channels, read and written together.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

// The geometry of one bin of one box.
template <typename A>
struct Bin {
  bool usable;  // if false, the bin is zero
  int level;
  int64_t image, height, width;
  RoiAxis<A> y, x;
  A samples = 1;  // sums are divided by it, which gives exactly 0.5 for a mask on half of the samples
};

template <typename A>
__device__ Bin<A> find_bin(const PyramidShape& pyramid, const A* box, const RoiAlignParams& params) {
  Bin<A> bin{};
  const bool in_batch = box[0] >= A(0) && box[0] < static_cast<A>(pyramid.batch);  // false for NaN
  if (!in_batch) return bin;
  bin.image = static_cast<int64_t>(box[0]);
  bin.level = level_of_box(params.rule, pyramid.levels, box[1], box[2], box[3], box[4]);
  bin.height = pyramid.height[bin.level];
  bin.width = pyramid.width[bin.level];
  const A map_scale = static_cast<A>(pyramid.scale[bin.level]);
  bin.y =
      make_roi_axis(box[2], box[4], map_scale, params.pooled_height, params.sampling_ratio, params.aligned);
  bin.x =
      make_roi_axis(box[1], box[3], map_scale, params.pooled_width, params.sampling_ratio, params.aligned);
  if (bin.y.grid <= 0 || bin.x.grid <= 0 || bin.height == 0 || bin.width == 0) return bin;
  bin.samples = static_cast<A>(bin.y.grid) * static_cast<A>(bin.x.grid);
  bin.usable = true;
  return bin;
}

// One axis of a bin, folded over the lanes of a warp: lane i holds the summed weights of the samples that
// touch pixel `first` + i. Samples share pixels, so there are fewer pixels than samples times two.
template <typename A>
struct WarpFold {
  int first;
  A weight;
  unsigned touched;  // lanes whose weight is not zero
};

// All lanes of the warp call this together. Returns false if the bin has more samples or pixels than there
// are lanes.
template <typename A>
__device__ bool fold_axis(const RoiAxis<A>& axis, int64_t bin_index, int64_t size, WarpFold<A>* fold) {
  constexpr int kNone = 0x7FFFFFFF;
  if (axis.grid > 32 || size >= kNone) return false;
  const int lane = static_cast<int>(threadIdx.x % 32), grid = static_cast<int>(axis.grid);
  Taps<A> taps{0, 0, A(0), A(0), false};
  if (lane < grid) taps = bilinear_taps(axis.sample(bin_index, lane), size);
  const int low = taps.valid ? static_cast<int>(taps.low) : kNone;
  const int high = taps.valid ? static_cast<int>(taps.high) : -1;
  int first = low, last = high;
  for (int distance = 16; distance > 0; distance /= 2) {
    first = min(first, __shfl_xor_sync(kFullWarp, first, distance));
    last = max(last, __shfl_xor_sync(kFullWarp, last, distance));
  }
  if (last - 32 >= first) return false;
  fold->first = first;
  fold->weight = A(0);
  const int pixel = first + lane;
  for (int i = 0; i < grid && first != kNone; ++i) {
    const int low_i = __shfl_sync(kFullWarp, low, i), high_i = __shfl_sync(kFullWarp, high, i);
    const A low_weight = __shfl_sync(kFullWarp, taps.low_weight, i);
    const A high_weight = __shfl_sync(kFullWarp, taps.high_weight, i);
    if (low_i == pixel) fold->weight += low_weight;
    if (high_i == pixel) fold->weight += high_weight;
  }
  fold->touched = __ballot_sync(kFullWarp, fold->weight != A(0));
  return true;
}

// Calls visit(row, column, weight) for each pixel of the bin, with the same arguments in all lanes of the
// warp. The weights are those of a sum over the samples.
template <typename A, typename Visit>
__device__ void visit_pixels(const Bin<A>& bin, int64_t ph, int64_t pw, Visit visit) {
  WarpFold<A> y, x;
  if (fold_axis(bin.y, ph, bin.height, &y) && fold_axis(bin.x, pw, bin.width, &x)) {
    for (unsigned rows = y.touched; rows != 0; rows &= rows - 1) {
      const int i = __ffs(static_cast<int>(rows)) - 1;
      const A row_weight = __shfl_sync(kFullWarp, y.weight, i);
      for (unsigned columns = x.touched; columns != 0; columns &= columns - 1) {
        const int j = __ffs(static_cast<int>(columns)) - 1;
        visit(int64_t{y.first} + i, int64_t{x.first} + j, row_weight * __shfl_sync(kFullWarp, x.weight, j));
      }
    }
    return;
  }
  const Range rows = samples_on_map(bin.y, ph, bin.height), columns = samples_on_map(bin.x, pw, bin.width);
  for (int64_t iy = rows.begin; iy < rows.end; ++iy) {
    const Taps<A> v = bilinear_taps(bin.y.sample(ph, iy), bin.height);
    if (!v.valid) continue;
    for (int64_t ix = columns.begin; ix < columns.end; ++ix) {
      const Taps<A> h = bilinear_taps(bin.x.sample(pw, ix), bin.width);
      if (!h.valid) continue;
      visit(v.low, h.low, v.low_weight * h.low_weight);
      visit(v.low, h.high, v.low_weight * h.high_weight);
      visit(v.high, h.low, v.high_weight * h.low_weight);
      visit(v.high, h.high, v.high_weight * h.high_weight);
    }
  }
}

// Returns whether packs of V channels can be read: the number of channels must be a multiple of V, and every
// address a multiple of the size of a pack.
template <typename T, int V>
bool takes_packs(int64_t channels, std::initializer_list<const void*> pointers) {
  bool aligned = channels % V == 0;
  for (const void* pointer : pointers) aligned &= reinterpret_cast<uintptr_t>(pointer) % (sizeof(T) * V) == 0;
  return aligned;
}

inline unsigned blocks_for(int64_t items, int64_t items_per_block) {
  const int64_t blocks = (items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

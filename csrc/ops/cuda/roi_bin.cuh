// The geometry of a bin, packs of channels, and sizes of grids.
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

// The taps of one box, as a block finds them: the rows and columns of pixels that its bins touch, and their
// weights. Bilinear weights are products, so a bin is a sum over the product of its rows and columns.
#pragma once

#include <type_traits>
#include <utility>

#include "ops/cuda/launch.cuh"
#include "ops/cuda/roi_bin.cuh"

namespace panfpn::inline PANFPN_ARITHMETIC {

// Columns of bins in a block that processes channels-last maps, one for each warp.
constexpr int kMostColumns = 7;

// Taps in shared memory along either axis: 36 samples in each of 7 bins, 45 for NCHW, and more if the map is
// small.
constexpr int kChannelsLastTaps = 512, kNchwTaps = 640;

constexpr int kPlaneSums = 256;  // NCHW: columns of pixels whose sums a warp keeps for each channel

// A row or column of pixels, and the summed weight of the samples of a bin that touch it.
struct alignas(8) Tap {
  int pixel;
  float weight;
};

// The maximum number of taps of a bin: two for each sample, and no more than there are pixels.
__device__ inline int64_t tap_slots(const RoiAxis<float>& axis, int64_t size) {
  return min(2 * axis.grid, size);
}

// Finds the taps of one bin, whose slots fit in shared memory, and returns their number. Samples come in the
// order of the axis, and neighbouring ones share pixels, so a tap that exists is among the last two.
__device__ inline int find_taps(const RoiAxis<float>& axis, int64_t bin_index, int64_t size, Tap* taps) {
  int count = 0;
  const auto add = [&](int pixel, float weight) {
    if (weight == 0.0f) return;
    for (int i = count - 1; i >= 0 && i >= count - 2; --i) {
      if (taps[i].pixel != pixel) continue;
      taps[i].weight += weight;
      return;
    }
    taps[count++] = {pixel, weight};
  };
  const bool ascending = axis.bin >= 0.0f;
  const int grid = static_cast<int>(axis.grid);
  PANFPN_UNROLL_BY(1)
  for (int i = 0; i < grid; ++i) {
    const Taps<float> sample = bilinear_taps(axis.sample(bin_index, i), size);
    if (!sample.valid) continue;
    const int low = static_cast<int>(sample.low), high = static_cast<int>(sample.high);
    PANFPN_UNROLL_BY(1)
    for (int turn = 0; turn < 2; ++turn) {
      const bool is_low = ascending == (turn == 0);
      add(is_low ? low : high, is_low ? sample.low_weight : sample.high_weight);
    }
  }
  return count;
}

// Calls visit(pixel, weight) for each pixel of each sample of a bin, without taps. The weights are those of a
// sum over the samples.
template <typename Visit>
__device__ void visit_samples(const Bin<float>& bin, int64_t ph, int64_t pw, Visit&& visit) {
  if (!bin.usable) return;
  const Range rows = samples_on_map(bin.y, ph, bin.height), columns = samples_on_map(bin.x, pw, bin.width);
  for (int64_t iy = rows.begin; iy < rows.end; ++iy) {
    const Taps<float> y = bilinear_taps(bin.y.sample(ph, iy), bin.height);
    if (!y.valid) continue;
    const int64_t low = y.low * bin.width, high = y.high * bin.width;
    for (int64_t ix = columns.begin; ix < columns.end; ++ix) {
      const Taps<float> x = bilinear_taps(bin.x.sample(pw, ix), bin.width);
      if (!x.valid) continue;
      PANFPN_UNROLL_BY(1)
      for (int corner = 0; corner < 4; ++corner) {
        const bool top = corner < 2, left = corner % 2 == 0;
        visit((top ? low : high) + (left ? x.low : x.high),
              (top ? y.low_weight : y.high_weight) * (left ? x.low_weight : x.high_weight));
      }
    }
  }
}

// The properties of a box that the warps of its block share.
struct BlockBox {
  bool fits;
  int level;
  int64_t map;    // the first value of the box's image in the tensor of its level
  int64_t plane;  // pixels of the map
  float samples, inverse_samples;
  int row_slots, column_slots;  // for the taps of one bin
};

// Returns whether the taps of a block fit in shared memory, and offsets in bytes in 31 bits: in the map of
// one image, or, for NCHW, in one channel of it.
template <bool channels_last, typename T>
__device__ bool box_fits(const Bin<float>& bin, const Pyramid<T>& pyramid, const RoiAlignParams& params) {
  constexpr int64_t kTaps = channels_last ? kChannelsLastTaps : kNchwTaps;
  constexpr int64_t kMostValues = (int64_t{1} << 31) / static_cast<int64_t>(sizeof(T));
  const int64_t row_slots = tap_slots(bin.y, bin.height), column_slots = tap_slots(bin.x, bin.width);
  const int64_t block_columns = channels_last ? int64_t{kMostColumns} : params.pooled_width;
  return params.pooled_height <= kTaps && block_columns <= kTaps &&
         row_slots <= kTaps / params.pooled_height && column_slots <= kTaps / block_columns &&
         (channels_last || column_slots < kPlaneSums) &&
         bin.height * bin.width * (channels_last ? pyramid.channels : 1) < kMostValues;
}

// The first warp of a block finds the taps of all rows of bins and of the block's columns of bins. Those of
// rows hold offsets in bytes, those of columns too, but for NCHW in pixels. Unused slots of columns are zero.
template <bool channels_last, typename T>
__device__ void find_box_taps(const Pyramid<T>& pyramid, const float* roi, const RoiAlignParams& params,
                              Range block_columns, BlockBox* box, Tap* rows, Tap* columns, int* counts) {
  const Bin<float> bin = find_bin(pyramid, roi, params);
  const int lane = static_cast<int>(threadIdx.x);
  const bool fits = box_fits<channels_last>(bin, pyramid, params);
  const int row_slots = static_cast<int>(tap_slots(bin.y, bin.height));
  const int column_slots = static_cast<int>(tap_slots(bin.x, bin.width));
  if (lane == 0) {
    const int64_t plane = bin.height * bin.width;
    *box = {fits,      bin.level,   bin.image * pyramid.channels * plane,
            plane,     bin.samples, 1.0f / bin.samples,
            row_slots, column_slots};
  }
  if (!fits) return;
  const int bin_rows = static_cast<int>(params.pooled_height);
  const int all = bin_rows + static_cast<int>(block_columns.size());
  const int pixel_bytes = static_cast<int>((channels_last ? pyramid.channels : 1) * sizeof(T));
  const int row_step = static_cast<int>(bin.width) * pixel_bytes,
            column_step = channels_last ? pixel_bytes : 1;
  for (int i = lane; i < all; i += 32) {
    const bool is_row = i < bin_rows;
    const int column = i - bin_rows, slots = is_row ? row_slots : column_slots;
    const RoiAxis<float> axis{is_row ? bin.y.start : bin.x.start, is_row ? bin.y.bin : bin.x.bin,
                              is_row ? bin.y.grid : bin.x.grid};
    const int64_t at = is_row ? i : block_columns.begin + column;
    Tap* taps = is_row ? rows + i * row_slots : columns + column * column_slots;
    const int found = bin.usable ? find_taps(axis, at, is_row ? bin.height : bin.width, taps) : 0;
    for (int j = 0; j < found; ++j) taps[j].pixel *= is_row ? row_step : column_step;
    for (int j = found; j < slots && !is_row; ++j) taps[j] = {0, 0.0f};
    counts[i] = found;
  }
}

// Returns sum / samples, given 1 / samples. A float is rounded correctly, unless it is below the normal
// numbers: the remainder corrects the quotient, in a third of the instructions of a division. A narrower
// result does not need this.
template <typename T>
__device__ __forceinline__ T mean(float sum, float samples, float inverse_samples) {
  const float quotient = sum * inverse_samples;
  if constexpr (sizeof(T) < sizeof(float)) return static_cast<T>(quotient);
  const float corrected = fmaf(fmaf(-quotient, samples, sum), inverse_samples, quotient);
  return fabsf(quotient) < INFINITY ? corrected : quotient;
}

// The taps of one column of bins. `kCount` of them are in registers; if it is 0, any number is in shared
// memory.
template <int kCount>
struct ColumnTaps {
  Tap taps[kCount];

  __device__ explicit ColumnTaps(const Tap* shared, int) {
    PANFPN_UNROLL
    for (int i = 0; i < kCount; ++i) taps[i] = shared[i];
  }
  template <typename F>
  __device__ __forceinline__ void for_each(F&& f) const {
    PANFPN_UNROLL
    for (int i = 0; i < kCount; ++i) f(taps[i]);
  }
};
template <>
struct ColumnTaps<0> {
  const Tap* taps;
  int count;

  __device__ explicit ColumnTaps(const Tap* shared, int count_) : taps(shared), count(count_) {}
  template <typename F>
  __device__ __forceinline__ void for_each(F&& f) const {
    PANFPN_UNROLL_BY(2)
    for (int i = 0; i < count; ++i) f(taps[i]);
  }
};

// Calls f with the number of a column's taps that ColumnTaps keeps in registers, as a type. Most columns of
// bins touch 2 to 5 pixels in a row.
template <typename F>
__device__ __forceinline__ void with_column_count(int count, F&& f) {
  switch (count) {
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

// A size of the grid along y or z; the kernel takes the rest in further rounds.
inline unsigned grid_share(int64_t items) {
  constexpr int64_t kMost = 65535;
  return static_cast<unsigned>(items < kMost ? items : kMost);
}

// Grid and block of a launch for channels-last maps: boxes along x, groups of columns of bins along y, and
// groups of 32 * pack channels along z.
inline std::pair<dim3, dim3> column_launch(int64_t boxes, int64_t channels, int64_t pack,
                                           const RoiAlignParams& params) {
  const int64_t groups = (params.pooled_width + kMostColumns - 1) / kMostColumns;
  const int64_t warps = (params.pooled_width + groups - 1) / groups;
  return {
      dim3(blocks_for(boxes, 1), grid_share(groups), grid_share((channels + 32 * pack - 1) / (32 * pack))),
      dim3(static_cast<unsigned>(32 * warps))};
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

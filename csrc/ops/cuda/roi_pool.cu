// The same kernels serve one level and several. A block first finds the rows and columns of pixels that the
// bins of a box touch, with their weights, for some of the channels. Channels-last: a warp computes a column
// of bins, and its lanes share the channels, 16 bytes each. NCHW: the lanes read neighbouring columns of
// pixels.
#include "ops/roi_pool.h"

#include "ops/cuda/launch.cuh"
#include "ops/cuda/roi_bin.cuh"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// Constants of the channels-last kernel.
constexpr int kMostColumns = 7;  // columns of bins in a block, one for each warp

// Constants of the NCHW kernel.
constexpr int kPoolThreads = 256;
constexpr int kWarps = kPoolThreads / 32;
constexpr int kPlanes =
    4;  // channels that a warp processes together, to load the weights once for all of them
constexpr int kBlockChannels = 64;
constexpr int kPlaneSums = 256;

// Taps in shared memory along either axis: 36 samples in each of 7 bins, 45 for NCHW, and more if the map is
// small.
constexpr int kChannelsLastTaps = 512, kNchwTaps = 640;

// A row or column of pixels, and the summed weight of the samples of a bin that touch it.
struct alignas(8) Tap {
  int pixel;
  float weight;
};

// The maximum number of taps of a bin: two for each sample, and no more than there are pixels.
__device__ int64_t tap_slots(const RoiAxis<float>& axis, int64_t size) {
  return min(2 * axis.grid, size);
}

// Finds the taps of one bin, whose slots fit in shared memory, and returns their number. Samples come in the
// order of the axis, and neighbouring ones share pixels, so a tap that exists is among the last two.
__device__ int find_taps(const RoiAxis<float>& axis, int64_t bin_index, int64_t size, Tap* taps) {
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

// Writes the mean of a bin's samples in V channels, without taps. `map` points to the first of the channels,
// and pixels are `step` values apart.
template <typename T, int V>
__device__ void pool_by_samples(const Bin<float>& bin, int64_t ph, int64_t pw, const T* map, int64_t step,
                                T* out) {
  Range rows{0, 0}, columns{0, 0};
  if (bin.usable) {
    rows = samples_on_map(bin.y, ph, bin.height), columns = samples_on_map(bin.x, pw, bin.width);
  }
  float sum[V] = {};
  const auto add = [&](int64_t pixel, float weight) {
    const auto pack = *reinterpret_cast<const Pack<T, V>*>(map + pixel * step);
    PANFPN_UNROLL
    for (int v = 0; v < V; ++v) sum[v] += weight * static_cast<float>(pack.values[v]);
  };
  for (int64_t iy = rows.begin; iy < rows.end; ++iy) {
    const Taps<float> y = bilinear_taps(bin.y.sample(ph, iy), bin.height);
    if (!y.valid) continue;
    const int64_t low = y.low * bin.width, high = y.high * bin.width;
    for (int64_t ix = columns.begin; ix < columns.end; ++ix) {
      const Taps<float> x = bilinear_taps(bin.x.sample(pw, ix), bin.width);
      if (!x.valid) continue;
      add(low + x.low, y.low_weight * x.low_weight);
      add(low + x.high, y.low_weight * x.high_weight);
      add(high + x.low, y.high_weight * x.low_weight);
      add(high + x.high, y.high_weight * x.high_weight);
    }
  }
  Pack<T, V> pack;
  PANFPN_UNROLL
  for (int v = 0; v < V; ++v) pack.values[v] = static_cast<T>(sum[v] / bin.samples);
  *reinterpret_cast<Pack<T, V>*>(out) = pack;
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

// Channels-last.

// What the warps of a block need to know about their box.
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
__device__ bool box_fits(const Bin<float>& bin, const Pyramid<const T>& pyramid,
                         const RoiAlignParams& params) {
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
__device__ void find_box_taps(const Pyramid<const T>& pyramid, const float* roi, const RoiAlignParams& params,
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

// A warp's column of bins, in V channels of each lane.
template <typename T>
struct Column {
  const T* map;  // the first of the channels
  const Tap *rows, *columns;
  const int* row_counts;
  int bin_rows, count;
  bool active;  // whether the lane has channels
  T* out;
  int64_t out_step;
};

// Adjacent bins often share a row of pixels, and its sum is used again.
template <typename T, int V, int kCount>
__device__ __forceinline__ void pool_column(const BlockBox& box, const Column<T>& column) {
  const ColumnTaps<kCount> columns(column.columns, column.count);
  const float samples = box.samples, inverse_samples = box.inverse_samples;
  const int row_slots = box.row_slots;
  const Tap* rows = column.rows;
  T* out = column.out;
  int summed_row = -1;
  float row_sum[V] = {};
  PANFPN_UNROLL_BY(1)
  for (int ph = 0; ph < column.bin_rows; ++ph) {
    float sum[V] = {};
    const Tap* rows_end = rows + column.row_counts[ph];
    PANFPN_UNROLL_BY(1)
    for (const Tap* next = rows; next != rows_end; ++next) {
      const Tap row = *next;
      if (row.pixel != summed_row) {
        summed_row = row.pixel;
        const char* line = reinterpret_cast<const char*>(column.map) + static_cast<unsigned>(row.pixel);
        PANFPN_UNROLL
        for (int v = 0; v < V; ++v) row_sum[v] = 0.0f;
        columns.for_each([&](const Tap& tap) {
          const auto pack = *reinterpret_cast<const Pack<T, V>*>(line + static_cast<unsigned>(tap.pixel));
          PANFPN_UNROLL
          for (int v = 0; v < V; ++v) row_sum[v] += tap.weight * static_cast<float>(pack.values[v]);
        });
      }
      PANFPN_UNROLL
      for (int v = 0; v < V; ++v) sum[v] += row.weight * row_sum[v];
    }
    rows += row_slots;
    if (column.active) {
      Pack<T, V> pack;
      PANFPN_UNROLL
      for (int v = 0; v < V; ++v) pack.values[v] = mean<T>(sum[v], samples, inverse_samples);
      *reinterpret_cast<Pack<T, V>*>(out) = pack;
    }
    out += column.out_step;
  }
}

// Most columns of bins touch 2 to 5 pixels in a row.
template <typename T, int V>
__device__ __forceinline__ void pool_column(const BlockBox& box, const Column<T>& column) {
  switch (column.count) {
    case 2:
      return pool_column<T, V, 2>(box, column);
    case 3:
      return pool_column<T, V, 3>(box, column);
    case 4:
      return pool_column<T, V, 4>(box, column);
    case 5:
      return pool_column<T, V, 5>(box, column);
    default:
      return pool_column<T, V, 0>(box, column);
  }
}

// Pools those boxes of a block that do not fit. Not inlined, so that it takes no registers from the others.
template <typename T, int V>
__device__ __noinline__ void pool_other_boxes(const Pyramid<const T>& pyramid, const float* boxes,
                                              int64_t count, const RoiAlignParams& params, T* out) {
  const int64_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int64_t k = blockIdx.x; k < count; k += gridDim.x) {
    const Bin<float> bin = find_bin(pyramid, boxes + k * 5, params);
    if (box_fits<true>(bin, pyramid, params)) continue;
    const T* map = pyramid.data[bin.level] + bin.image * pyramid.channels * bin.height * bin.width;
    for (int64_t pw = blockIdx.y * warps + warp; pw < params.pooled_width; pw += gridDim.y * warps) {
      for (int64_t c = (int64_t{blockIdx.z} * 32 + lane) * V; c < pyramid.channels;
           c += int64_t{gridDim.z} * 32 * V) {
        for (int64_t ph = 0; ph < params.pooled_height; ++ph) {
          const int64_t index = (k * params.pooled_height + ph) * params.pooled_width + pw;
          pool_by_samples<T, V>(bin, ph, pw, map + c, pyramid.channels, out + index * pyramid.channels + c);
        }
      }
    }
  }
}

// A block processes a box, up to kMostColumns columns of its bins, and 32 * V channels. A warp takes a column
// of bins, and a lane V channels, 16 bytes if possible.
template <typename T, int V>
__global__ void __launch_bounds__(32 * kMostColumns, 4)
    pool_channels_last(const __grid_constant__ Pyramid<const T> pyramid, const float* boxes, int64_t count,
                       const __grid_constant__ RoiAlignParams params, T* out) {
  PANFPN_SHARED(BlockBox, box, 1);
  PANFPN_SHARED(Tap, rows, kChannelsLastTaps);
  PANFPN_SHARED(Tap, columns, kChannelsLastTaps);
  PANFPN_SHARED(int, counts, kChannelsLastTaps + kMostColumns);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int64_t channels = pyramid.channels;
  bool others = false;
  for (int64_t k = blockIdx.x; k < count; k += gridDim.x) {
    for (int64_t first = int64_t{blockIdx.y} * warps; first < params.pooled_width;
         first += int64_t{gridDim.y} * warps) {
      if (warp == 0) {
        const Range block_columns{first, min(first + warps, params.pooled_width)};
        find_box_taps<true>(pyramid, boxes + k * 5, params, block_columns, box, rows, columns, counts);
      }
      __syncthreads();
      others |= !box->fits;
      const int64_t pw = first + warp;
      if (box->fits && pw < params.pooled_width) {
        const int bin_rows = static_cast<int>(params.pooled_height);
        for (int64_t c = int64_t{blockIdx.z} * 32 * V; c < channels; c += int64_t{gridDim.z} * 32 * V) {
          const int64_t own = c + lane * V;
          const bool active = own < channels;
          const Column<T> column{pyramid.data[box->level] + box->map + (active ? own : 0),
                                 rows,
                                 columns + warp * box->column_slots,
                                 counts,
                                 bin_rows,
                                 counts[bin_rows + warp],
                                 active,
                                 out + (k * bin_rows * params.pooled_width + pw) * channels + own,
                                 params.pooled_width * channels};
          pool_column<T, V>(*box, column);
        }
      }
      __syncthreads();  // before the taps of the next box are written
    }
  }
  if (others) pool_other_boxes<T, V>(pyramid, boxes, count, params, out);
}

// NCHW.

// The taps of a box in shared memory, as find_box_taps leaves them.
struct BoxTaps {
  const Tap *rows, *columns;
  const int *row_counts, *column_counts;  // taps of each bin
  int row_slots, column_slots;
  int pooled_height, pooled_width;
  float samples, inverse_samples;
};

// Neighbouring columns of bins, and the columns of pixels that they touch: all from `first` on if these are
// fewer than the taps, otherwise those of the slots.
struct Segment {
  int first_bin, bins;
  bool dense;
  int first, width;
};

__device__ Segment find_segment(const BoxTaps& box, int first_bin, int bins) {
  int low = 0x7FFFFFFF, high = -1;
  for (int b = first_bin; b < first_bin + bins; ++b) {
    const int count = box.column_counts[b];
    if (count == 0) continue;
    // Taps are in ascending or in descending order.
    const int begin = box.columns[b * box.column_slots].pixel;
    const int end = box.columns[b * box.column_slots + count - 1].pixel;
    low = min(low, min(begin, end)), high = max(high, max(begin, end));
  }
  const int range = high < 0 ? 0 : high - low + 1, slots = bins * box.column_slots;
  return range <= slots ? Segment{first_bin, bins, true, low, range}
                        : Segment{first_bin, bins, false, 0, slots};
}

// One warp pools the bins of a segment in kPlanes channels. First each lane takes a column of pixels in a row
// of bins, and sums over the rows of pixels; then each lane takes a bin and sums over its columns.
template <typename T>
__device__ void pool_planes(const BoxTaps& box, const Segment& segment, const T* plane, int64_t plane_size,
                            int used, float* sums, T* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Tap* columns = box.columns + segment.first_bin * box.column_slots;
  const unsigned width = static_cast<unsigned>(segment.width), bins = static_cast<unsigned>(segment.bins);
  const int pitch = segment.width | 1;  // odd, so that rows of bins start in different banks
  const int rows_at_once = kPlaneSums / pitch, all_bins = box.pooled_height * box.pooled_width;
  for (int begin = 0; begin < box.pooled_height; begin += rows_at_once) {
    const int count = min(rows_at_once, box.pooled_height - begin);
    for (unsigned item = lane; item < count * width; item += 32) {
      const unsigned i = item / width, slot = item - i * width;
      const T* column =
          plane + (segment.dense ? segment.first + static_cast<int>(slot) : columns[slot].pixel);
      const char* planes[kPlanes];
      PANFPN_UNROLL
      for (int p = 0; p < kPlanes; ++p) {
        planes[p] = reinterpret_cast<const char*>(column + (p < used ? p * plane_size : 0));
      }
      const Tap* rows = box.rows + (begin + i) * box.row_slots;
      const Tap* rows_end = rows + box.row_counts[begin + i];
      float sum[kPlanes] = {};
      PANFPN_UNROLL_BY(2)
      for (; rows < rows_end; ++rows) {
        const Tap row = *rows;
        PANFPN_UNROLL
        for (int p = 0; p < kPlanes; ++p) {
          const T* pixel = reinterpret_cast<const T*>(planes[p] + static_cast<unsigned>(row.pixel));
          sum[p] += row.weight * static_cast<float>(*pixel);
        }
      }
      PANFPN_UNROLL
      for (int p = 0; p < kPlanes; ++p) sums[p * kPlaneSums + i * pitch + slot] = sum[p];
    }
    __syncwarp();
    for (unsigned item = lane; item < count * bins; item += 32) {
      const unsigned i = item / bins, b = item - i * bins;
      const Tap* taps = columns + b * box.column_slots;
      const int column_count = box.column_counts[segment.first_bin + b];
      float sum[kPlanes] = {};
      PANFPN_UNROLL_BY(2)
      for (int j = 0; j < column_count; ++j) {
        const Tap tap = taps[j];
        const int slot =
            segment.dense ? tap.pixel - segment.first : static_cast<int>(b) * box.column_slots + j;
        PANFPN_UNROLL
        for (int p = 0; p < kPlanes; ++p) sum[p] += tap.weight * sums[p * kPlaneSums + i * pitch + slot];
      }
      T* bin = out + ((begin + i) * box.pooled_width + segment.first_bin + b);
      PANFPN_UNROLL
      for (int p = 0; p < kPlanes; ++p) {
        if (p < used) bin[int64_t{p} * all_bins] = mean<T>(sum[p], box.samples, box.inverse_samples);
      }
    }
    __syncwarp();
  }
}

// As pool_other_boxes, for NCHW.
template <typename T>
__device__ __noinline__ void pool_other_planes(const Pyramid<const T>& pyramid, const float* boxes,
                                               int64_t count, const RoiAlignParams& params, T* out) {
  const int64_t bins = params.pooled_height * params.pooled_width;
  for (int64_t k = blockIdx.x; k < count; k += gridDim.x) {
    const Bin<float> bin = find_bin(pyramid, boxes + k * 5, params);
    if (box_fits<false>(bin, pyramid, params)) continue;
    const int64_t plane = bin.height * bin.width;
    const T* map = pyramid.data[bin.level] + bin.image * pyramid.channels * plane;
    for (int64_t first = int64_t{blockIdx.y} * kBlockChannels; first < pyramid.channels;
         first += int64_t{gridDim.y} * kBlockChannels) {
      const int64_t last = min(first + kBlockChannels, pyramid.channels);
      for (int64_t i = first * bins + threadIdx.x; i < last * bins; i += kPoolThreads) {
        const int64_t c = i / bins, ph = i % bins / params.pooled_width, pw = i % params.pooled_width;
        pool_by_samples<T, 1>(bin, ph, pw, map + c * plane, 1, out + k * pyramid.channels * bins + i);
      }
    }
  }
}

// A block processes a box and kBlockChannels of its channels. Three blocks fit on a multiprocessor.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 3)
    pool_nchw(const __grid_constant__ Pyramid<const T> pyramid, const float* boxes, int64_t count,
              const __grid_constant__ RoiAlignParams params, T* out) {
  PANFPN_SHARED(BlockBox, box, 1);
  PANFPN_SHARED(Tap, rows, kNchwTaps);
  PANFPN_SHARED(Tap, columns, kNchwTaps);
  PANFPN_SHARED(int, counts, 2 * kNchwTaps);
  PANFPN_SHARED(float, sums, kWarps * kPlanes * kPlaneSums);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t channels = pyramid.channels, bins = params.pooled_height * params.pooled_width;
  bool others = false;
  for (int64_t k = blockIdx.x; k < count; k += gridDim.x) {
    if (warp == 0) {
      find_box_taps<false>(pyramid, boxes + k * 5, params, {0, params.pooled_width}, box, rows, columns,
                           counts);
    }
    __syncthreads();
    others |= !box->fits;
    if (box->fits) {
      const int pooled_height = static_cast<int>(params.pooled_height);
      const BoxTaps taps{rows,           columns,
                         counts,         counts + pooled_height,
                         box->row_slots, box->column_slots,
                         pooled_height,  static_cast<int>(params.pooled_width),
                         box->samples,   box->inverse_samples};
      const T* map = pyramid.data[box->level] + box->map;
      // All columns of bins together if their row sums fit, otherwise one after the other.
      Segment segment = find_segment(taps, 0, taps.pooled_width);
      const int together = segment.width < kPlaneSums ? taps.pooled_width : 1;
      for (int first_bin = 0; first_bin < taps.pooled_width; first_bin += together) {
        if (together < taps.pooled_width) segment = find_segment(taps, first_bin, together);
        for (int64_t first = int64_t{blockIdx.y} * kBlockChannels; first < channels;
             first += int64_t{gridDim.y} * kBlockChannels) {
          const int64_t last = min(first + kBlockChannels, channels);
          for (int64_t c = first + warp * kPlanes; c < last; c += kWarps * kPlanes) {
            const int used = static_cast<int>(min(last - c, int64_t{kPlanes}));
            pool_planes(taps, segment, map + c * box->plane, box->plane, used,
                        sums + warp * kPlanes * kPlaneSums, out + (k * channels + c) * bins);
          }
        }
      }
    }
    __syncthreads();  // before the taps of the next box are written
  }
  if (others) pool_other_planes<T>(pyramid, boxes, count, params, out);
}

// A size of the grid along y or z; the kernel takes the rest in further rounds.
unsigned grid_share(int64_t items) {
  constexpr int64_t kMost = 65535;
  return static_cast<unsigned>(items < kMost ? items : kMost);
}

}  // namespace

Tensor pool_features(const std::vector<Tensor>& features, const std::vector<double>& scales,
                     const Tensor& boxes_in, const RoiAlignParams& params, const char* op) {
  const DeviceGuard guard(features[0].get_device_index());
  const DenseFeatures dense = dense_features(features);
  const Tensor boxes = torch::stable::contiguous(boxes_in);
  const int64_t channels = features[0].size(1);
  Tensor out = empty_nchw({boxes.size(0), channels, params.pooled_height, params.pooled_width}, features[0],
                          dense.channels_last);
  const auto stream = current_stream(out);
  dispatch_feature_type(features[0].scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Pyramid<const T> pyramid = make_pyramid<T>(dense.maps, scales);
    const auto* boxes_data = boxes.const_data_ptr<float>();
    T* out_data = out.mutable_data_ptr<T>();
    if (dense.channels_last) {
      constexpr int V = 16 / sizeof(T);
      bool packs = takes_packs<T, V>(channels, {out_data});
      for (int level = 0; level < pyramid.levels; ++level) {
        packs &= takes_packs<T, V>(channels, {pyramid.data[level]});
      }
      const int64_t groups = (params.pooled_width + kMostColumns - 1) / kMostColumns;
      const int64_t columns = (params.pooled_width + groups - 1) / groups;
      const auto launch = [&](auto* kernel, int64_t pack) {
        const dim3 grid(blocks_for(boxes.size(0), 1), grid_share(groups),
                        grid_share((channels + 32 * pack - 1) / (32 * pack)));
        PANFPN_LAUNCH(kernel, grid, dim3(static_cast<unsigned>(32 * columns)), 0, stream, pyramid, boxes_data,
                      boxes.size(0), params, out_data);
      };
      packs ? launch(pool_channels_last<T, V>, V) : launch(pool_channels_last<T, 1>, 1);
    } else {
      const dim3 grid(blocks_for(boxes.size(0), 1),
                      grid_share((channels + kBlockChannels - 1) / kBlockChannels));
      PANFPN_LAUNCH(pool_nchw<T>, grid, dim3(kPoolThreads), 0, stream, pyramid, boxes_data, boxes.size(0),
                    params, out_data);
    }
  });
  return out;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

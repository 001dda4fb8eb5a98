// The same kernels serve one level and several. A block first finds the rows and columns of pixels that the
// bins of a box touch, with their weights, for some of the channels. Channels-last: a warp computes a column
// of bins, and its lanes share the channels, 16 bytes each. NCHW: the lanes read neighbouring columns of
// pixels.
#include "ops/roi_pool.h"

#include "ops/cuda/launch.cuh"
#include "ops/cuda/roi_bin.cuh"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

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

// Channels-last.

constexpr int kMostColumns = 7;  // columns of bins in a block, one for each warp
constexpr int kBoxTaps = 512;  // along either axis: 36 samples in each of 7 bins, or more if the map is small

// What the warps of a block need to know about their box.
struct BlockBox {
  bool fits;
  int level;
  int64_t map;  // the first value of the box's image in the tensor of its level
  float samples, inverse_samples;
  int row_slots, column_slots;  // for the taps of one bin
};

// Returns whether the taps of a block fit in shared memory, and offsets in the map of one image in 31 bits.
template <typename T>
__device__ bool box_fits(const Bin<float>& bin, const Pyramid<const T>& pyramid,
                         const RoiAlignParams& params) {
  constexpr int64_t kMostBytes = int64_t{1} << 31;
  return tap_slots(bin.y, bin.height) <= kBoxTaps / params.pooled_height &&
         tap_slots(bin.x, bin.width) <= kBoxTaps / kMostColumns && params.pooled_height <= kBoxTaps &&
         bin.height * bin.width * pyramid.channels < kMostBytes / static_cast<int64_t>(sizeof(T));
}

// The first warp of a block finds the taps of all rows of bins and of the block's columns of bins. They hold
// offsets in bytes.
template <typename T>
__device__ void find_box_taps(const Pyramid<const T>& pyramid, const float* roi, const RoiAlignParams& params,
                              Range block_columns, BlockBox* box, Tap* rows, Tap* columns, int* counts) {
  const Bin<float> bin = find_bin(pyramid, roi, params);
  const int lane = static_cast<int>(threadIdx.x);
  const bool fits = box_fits(bin, pyramid, params);
  const int row_slots = static_cast<int>(tap_slots(bin.y, bin.height));
  const int column_slots = static_cast<int>(tap_slots(bin.x, bin.width));
  if (lane == 0) {
    *box = {fits,        bin.level,          bin.image * pyramid.channels * bin.height * bin.width,
            bin.samples, 1.0f / bin.samples, row_slots,
            column_slots};
  }
  if (!fits) return;
  const int bin_rows = static_cast<int>(params.pooled_height),
            all = bin_rows + static_cast<int>(block_columns.size());
  const int pixel_bytes = static_cast<int>(pyramid.channels * sizeof(T));
  for (int i = lane; i < all; i += 32) {
    const bool is_row = i < bin_rows;
    const int column = i - bin_rows;
    const RoiAxis<float> axis{is_row ? bin.y.start : bin.x.start, is_row ? bin.y.bin : bin.x.bin,
                              is_row ? bin.y.grid : bin.x.grid};
    const int64_t at = is_row ? i : block_columns.begin + column;
    Tap* taps = is_row ? rows + i * row_slots : columns + column * column_slots;
    const int found = bin.usable ? find_taps(axis, at, is_row ? bin.height : bin.width, taps) : 0;
    const int step = is_row ? static_cast<int>(bin.width) * pixel_bytes : pixel_bytes;
    for (int j = 0; j < found; ++j) taps[j].pixel *= step;
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
    if (box_fits(bin, pyramid, params)) continue;
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
  PANFPN_SHARED(Tap, rows, kBoxTaps);
  PANFPN_SHARED(Tap, columns, kBoxTaps);
  PANFPN_SHARED(int, counts, kBoxTaps + kMostColumns);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int64_t channels = pyramid.channels;
  bool others = false;
  for (int64_t k = blockIdx.x; k < count; k += gridDim.x) {
    for (int64_t first = int64_t{blockIdx.y} * warps; first < params.pooled_width;
         first += int64_t{gridDim.y} * warps) {
      if (warp == 0) {
        const Range block_columns{first, min(first + warps, params.pooled_width)};
        find_box_taps(pyramid, boxes + k * 5, params, block_columns, box, rows, columns, counts);
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

constexpr int kPoolThreads = 256;
constexpr int kWarps = kPoolThreads / 32;
constexpr int kPlanes =
    4;  // channels that a warp processes together, to load the weights once for all of them
constexpr int kBlockChannels = 64;
constexpr int kAxisTaps = 768;  // enough for 48 samples in each of 7 bins, along either axis
constexpr int kPlaneSums = 256;

// Returns whether the taps of all bins fit in shared memory and pixel indices fit in 32 bits.
__device__ bool taps_fit(const Bin<float>& bin, const RoiAlignParams& params) {
  return tap_slots(bin.y, bin.height) <= kAxisTaps / params.pooled_height &&
         tap_slots(bin.x, bin.width) <= kAxisTaps / params.pooled_width &&
         tap_slots(bin.x, bin.width) < kPlaneSums && bin.height * bin.width < int64_t{1} << 31;
}

// A box, as a block computes it.
struct BoxTaps {
  const Tap *rows, *columns;  // the slots of all bins, bin by bin
  const int* row_counts;      // taps of each bin
  int row_slots, column_slots;
  int bins, pooled_width;
  int map_width;
  float samples;
};

// One warp pools the bins of a box in kPlanes channels. First each lane takes one column tap of a bin and
// sums over the rows; then each lane takes a bin and sums over its columns.
template <typename T>
__device__ void pool_planes(const BoxTaps& box, const T* plane, int64_t plane_size, int used, float* sums,
                            T* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int pitch = box.column_slots + 1;  // odd, so that bins start in different banks
  const int bins_at_once = kPlaneSums / pitch;
  for (int begin = 0; begin < box.bins; begin += bins_at_once) {
    const int count = min(bins_at_once, box.bins - begin);
    for (unsigned item = lane; item < static_cast<unsigned>(count * box.column_slots); item += 32) {
      const unsigned i = item / static_cast<unsigned>(box.column_slots), slot = item - i * box.column_slots;
      const unsigned ph = (begin + i) / static_cast<unsigned>(box.pooled_width);
      const unsigned pw = begin + i - ph * box.pooled_width;
      const Tap column = box.columns[pw * box.column_slots + slot];
      const Tap* rows = box.rows + ph * box.row_slots;
      const int row_count = column.weight == 0.0f ? 0 : box.row_counts[ph];
      float sum[kPlanes] = {};
      PANFPN_UNROLL_BY(2)
      for (int j = 0; j < row_count; ++j) {
        const Tap row = rows[j];
        const T* pixel = plane + (row.pixel * box.map_width + column.pixel);
        PANFPN_UNROLL
        for (int p = 0; p < kPlanes; ++p) {
          if (p < used) sum[p] += row.weight * static_cast<float>(pixel[p * plane_size]);
        }
      }
      PANFPN_UNROLL
      for (int p = 0; p < kPlanes; ++p) sums[p * kPlaneSums + i * pitch + slot] = sum[p] * column.weight;
    }
    __syncwarp();
    for (int i = lane; i < count; i += 32) {
      float sum[kPlanes] = {};
      PANFPN_UNROLL_BY(2)
      for (int slot = 0; slot < box.column_slots; ++slot) {
        PANFPN_UNROLL
        for (int p = 0; p < kPlanes; ++p) sum[p] += sums[p * kPlaneSums + i * pitch + slot];
      }
      PANFPN_UNROLL
      for (int p = 0; p < kPlanes; ++p) {
        if (p < used) out[int64_t{p} * box.bins + begin + i] = static_cast<T>(sum[p] / box.samples);
      }
    }
    __syncwarp();
  }
}

// A block processes a box and kBlockChannels of its channels. Three blocks fit on a multiprocessor.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 3)
    pool_nchw(Pyramid<const T> pyramid, const float* boxes, int64_t count, RoiAlignParams params, T* out) {
  PANFPN_SHARED(Tap, rows, kAxisTaps);
  PANFPN_SHARED(Tap, columns, kAxisTaps);
  PANFPN_SHARED(int, row_counts, kAxisTaps / 2);
  PANFPN_SHARED(float, sums, kWarps * kPlanes * kPlaneSums);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int64_t channels = pyramid.channels, shares = (channels + kBlockChannels - 1) / kBlockChannels;
  const int64_t bins = params.pooled_height * params.pooled_width;
  for (int64_t index = blockIdx.x; index < count * shares; index += gridDim.x) {
    const int64_t k = index / shares, first = index % shares * kBlockChannels;
    const int64_t last = min(first + kBlockChannels, channels);
    const Bin<float> bin = find_bin(pyramid, boxes + k * 5, params);
    const int64_t plane_size = bin.height * bin.width;
    const T* map = pyramid.data[bin.level] + bin.image * channels * plane_size;
    T* box_out = out + k * channels * bins;
    if (!bin.usable || !taps_fit(bin, params)) {
      for (int64_t i = first * bins + thread; i < last * bins; i += kPoolThreads) {
        const int64_t c = i / bins, ph = i % bins / params.pooled_width, pw = i % params.pooled_width;
        pool_by_samples<T, 1>(bin, ph, pw, map + c * plane_size, 1, box_out + i);
      }
      continue;
    }
    const int pooled_height = static_cast<int>(params.pooled_height);
    const BoxTaps box{rows,
                      columns,
                      row_counts,
                      static_cast<int>(tap_slots(bin.y, bin.height)),
                      static_cast<int>(tap_slots(bin.x, bin.width)),
                      static_cast<int>(bins),
                      static_cast<int>(params.pooled_width),
                      static_cast<int>(bin.width),
                      bin.samples};
    for (int i = thread; i < pooled_height + box.pooled_width; i += kPoolThreads) {
      const bool is_row = i < pooled_height;
      const int pw = i - pooled_height;
      Tap* taps = is_row ? rows + i * box.row_slots : columns + pw * box.column_slots;
      const RoiAxis<float> axis{is_row ? bin.y.start : bin.x.start, is_row ? bin.y.bin : bin.x.bin,
                                is_row ? bin.y.grid : bin.x.grid};
      const int found = find_taps(axis, is_row ? i : pw, is_row ? bin.height : bin.width, taps);
      if (is_row) {
        row_counts[i] = found;
      } else {
        for (int slot = found; slot < box.column_slots; ++slot) taps[slot] = {0, 0.0f};
      }
    }
    __syncthreads();
    for (int64_t c = first + warp * kPlanes; c < last; c += kWarps * kPlanes) {
      const int used = static_cast<int>(min(last - c, int64_t{kPlanes}));
      pool_planes(box, map + c * plane_size, plane_size, used, sums + warp * kPlanes * kPlaneSums,
                  box_out + c * bins);
    }
    __syncthreads();  // before the taps of the next box are written
  }
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
      const int64_t shares = (channels + kBlockChannels - 1) / kBlockChannels;
      PANFPN_LAUNCH(pool_nchw<T>, dim3(blocks_for(boxes.size(0) * shares, 1)), dim3(kPoolThreads), 0, stream,
                    pyramid, boxes_data, boxes.size(0), params, out_data);
    }
  });
  return out;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// The same kernels serve one level and several. A block first finds the rows and columns of pixels that the
// bins of a box touch, with their weights, for some of the channels. Channels-last: a warp computes a column
// of bins, and its lanes share the channels, 16 bytes each. NCHW: the lanes read neighbouring columns of
// pixels.
#include "ops/roi_pool.h"

#include "ops/cuda/launch.cuh"
#include "ops/cuda/roi_taps.cuh"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// Constants of the NCHW kernel.
constexpr int kPoolThreads = 256;
constexpr int kWarps = kPoolThreads / 32;
constexpr int kPlanes =
    4;  // channels that a warp processes together, to load the weights once for all of them
constexpr int kBlockChannels = 64;

// Writes the mean of a bin's samples in V channels, without taps. `map` points to the first of the channels,
// and pixels are `step` values apart.
template <typename T, int V>
__device__ void pool_by_samples(const Bin<float>& bin, int64_t ph, int64_t pw, const T* map, int64_t step,
                                T* out) {
  float sum[V] = {};
  visit_samples(bin, ph, pw, [&](int64_t pixel, float weight) {
    const auto pack = *reinterpret_cast<const Pack<T, V>*>(map + pixel * step);
    PANFPN_UNROLL
    for (int v = 0; v < V; ++v) sum[v] += weight * static_cast<float>(pack.values[v]);
  });
  Pack<T, V> pack;
  PANFPN_UNROLL
  for (int v = 0; v < V; ++v) pack.values[v] = static_cast<T>(sum[v] / bin.samples);
  *reinterpret_cast<Pack<T, V>*>(out) = pack;
}

// Channels-last.

// A warp's column of bins, in V channels of each lane.
template <typename T>
struct Column {
  const T* map;  // the first of the channels
  const Tap *rows, *columns;
  const int* row_counts;
  int bin_rows, count;
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
    Pack<T, V> pack;
    PANFPN_UNROLL
    for (int v = 0; v < V; ++v) pack.values[v] = mean<T>(sum[v], samples, inverse_samples);
    *reinterpret_cast<Pack<T, V>*>(out) = pack;
    out += column.out_step;
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
        for (int64_t c = (int64_t{blockIdx.z} * 32 + lane) * V; c < channels;
             c += int64_t{gridDim.z} * 32 * V) {
          const Column<T> column{pyramid.data[box->level] + box->map + c,
                                 rows,
                                 columns + warp * box->column_slots,
                                 counts,
                                 bin_rows,
                                 counts[bin_rows + warp],
                                 out + (k * bin_rows * params.pooled_width + pw) * channels + c,
                                 params.pooled_width * channels};
          with_column_count(column.count,
                            [&](auto count) { pool_column<T, V, decltype(count)::value>(*box, column); });
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

// Divides by the same number again and again, in two instructions each time. The product of numerator and
// divisor must be below 2^31.
struct Divisor {
  unsigned reciprocal;

  __device__ static Divisor of(int divisor) {
    return {divisor == 0 ? 0 : 0x7FFFFFFFu / static_cast<unsigned>(divisor) + 1};
  }
  __device__ unsigned divide(unsigned numerator) const {
    return static_cast<unsigned>((uint64_t{numerator} * reciprocal) >> 31);
  }
};

// Neighbouring columns of bins, and the columns of pixels that they touch: all from `first` on if these are
// fewer than the taps, otherwise those of the slots.
struct Segment {
  int first_bin, bins;
  bool dense;
  int first, width;
  Divisor by_width, by_bins;
};

__device__ Segment all_columns(const BoxTaps& box) {
  int low = 0x7FFFFFFF, high = -1;
  for (int b = 0; b < box.pooled_width; ++b) {
    const int count = box.column_counts[b];
    if (count == 0) continue;
    // Taps are in ascending or in descending order.
    const int begin = box.columns[b * box.column_slots].pixel;
    const int end = box.columns[b * box.column_slots + count - 1].pixel;
    low = min(low, min(begin, end)), high = max(high, max(begin, end));
  }
  const int range = high < 0 ? 0 : high - low + 1, slots = box.pooled_width * box.column_slots;
  const bool dense = range <= slots;
  const int width = dense ? range : slots;
  return {0, box.pooled_width, dense, low, width, Divisor::of(width), Divisor::of(box.pooled_width)};
}

// One column of bins, with the slots that it uses.
__device__ Segment one_column(const BoxTaps& box, int bin) {
  const int count = box.column_counts[bin];
  return {bin, 1, false, 0, count, Divisor::of(count), Divisor::of(1)};
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
  const char* planes[kPlanes];
  PANFPN_UNROLL
  for (int p = 0; p < kPlanes; ++p) {
    planes[p] = reinterpret_cast<const char*>(plane + (p < used ? p * plane_size : 0));
  }
  for (int begin = 0; begin < box.pooled_height; begin += rows_at_once) {
    const int count = min(rows_at_once, box.pooled_height - begin);
    for (unsigned item = lane; item < count * width; item += 32) {
      const unsigned i = segment.by_width.divide(item), slot = item - i * width;
      const int column = segment.dense ? segment.first + static_cast<int>(slot) : columns[slot].pixel;
      const unsigned column_bytes = static_cast<unsigned>(column) * sizeof(T);
      const Tap* rows = box.rows + (begin + i) * box.row_slots;
      const Tap* rows_end = rows + box.row_counts[begin + i];
      float sum[kPlanes] = {};
      PANFPN_UNROLL_BY(2)
      for (; rows < rows_end; ++rows) {
        const Tap row = *rows;
        const unsigned offset = static_cast<unsigned>(row.pixel) + column_bytes;
        PANFPN_UNROLL
        for (int p = 0; p < kPlanes; ++p) {
          const T* pixel = reinterpret_cast<const T*>(planes[p] + offset);
          sum[p] += row.weight * static_cast<float>(*pixel);
        }
      }
      PANFPN_UNROLL
      for (int p = 0; p < kPlanes; ++p) sums[p * kPlaneSums + i * pitch + slot] = sum[p];
    }
    __syncwarp();
    for (unsigned item = lane; item < count * bins; item += 32) {
      const unsigned i = segment.by_bins.divide(item), b = item - i * bins;
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
        if (p < used) bin[p * all_bins] = mean<T>(sum[p], box.samples, box.inverse_samples);
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
  PANFPN_SHARED(Segment, shared_segment, 1);
  PANFPN_SHARED(Tap, rows, kNchwTaps);
  PANFPN_SHARED(Tap, columns, kNchwTaps);
  PANFPN_SHARED(int, counts, 2 * kNchwTaps);
  PANFPN_SHARED(float, sums, kWarps * kPlanes * kPlaneSums);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t channels = pyramid.channels, bins = params.pooled_height * params.pooled_width;
  bool others = false;
  const auto box_taps = [&] {
    const int pooled_height = static_cast<int>(params.pooled_height);
    return BoxTaps{rows,           columns,
                   counts,         counts + pooled_height,
                   box->row_slots, box->column_slots,
                   pooled_height,  static_cast<int>(params.pooled_width),
                   box->samples,   box->inverse_samples};
  };
  for (int64_t k = blockIdx.x; k < count; k += gridDim.x) {
    if (warp == 0) {
      find_box_taps<false>(pyramid, boxes + k * 5, params, {0, params.pooled_width}, box, rows, columns,
                           counts);
      __syncwarp();
      if (threadIdx.x == 0 && box->fits) *shared_segment = all_columns(box_taps());
    }
    __syncthreads();
    others |= !box->fits;
    if (box->fits) {
      const BoxTaps taps = box_taps();
      const T* map = pyramid.data[box->level] + box->map;
      // All columns of bins together if their row sums fit, otherwise one after the other.
      Segment segment = *shared_segment;
      const int together = segment.width < kPlaneSums ? taps.pooled_width : 1;
      for (int first_bin = 0; first_bin < taps.pooled_width; first_bin += together) {
        if (together < taps.pooled_width) segment = one_column(taps, first_bin);
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
      const auto launch = [&](auto* kernel, int64_t pack) {
        const auto [grid, block] = column_launch(boxes.size(0), channels, pack, params);
        PANFPN_LAUNCH(kernel, grid, block, 0, stream, pyramid, boxes_data, boxes.size(0), params, out_data);
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

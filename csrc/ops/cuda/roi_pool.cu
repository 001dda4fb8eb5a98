// The same kernels serve one level and several. Channels-last: a warp computes the weights of a bin's pixels
// once, and its lanes share the channels, 16 bytes each. NCHW: a block computes the weights of a box's rows
// and columns once for some of the channels, and its lanes read neighbouring columns.
#include "ops/roi_pool.h"

#include "ops/cuda/launch.cuh"
#include "ops/cuda/roi_bin.cuh"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kWarps = kPoolThreads / 32;

// Constants of the NCHW kernel.
constexpr int kPlanes =
    4;  // channels that a warp processes together, to load the weights once for all of them
constexpr int kBlockChannels = 64;
constexpr int kAxisTaps = 768;  // enough for 48 samples in each of 7 bins, along either axis
constexpr int kPlaneSums = 256;

// The mean of the bin's samples in the channel plane at `plane`.
template <typename T>
__device__ T pool_bin(const Bin<accumulate_t<T>>& bin, const T* plane, int64_t ph, int64_t pw) {
  using A = accumulate_t<T>;
  const Range rows = samples_on_map(bin.y, ph, bin.height), columns = samples_on_map(bin.x, pw, bin.width);
  A sum = 0;
  for (int64_t iy = rows.begin; iy < rows.end; ++iy) {
    const Taps<A> y = bilinear_taps(bin.y.sample(ph, iy), bin.height);
    if (!y.valid) continue;
    const T *low = plane + y.low * bin.width, *high = plane + y.high * bin.width;
    for (int64_t ix = columns.begin; ix < columns.end; ++ix) {
      const Taps<A> x = bilinear_taps(bin.x.sample(pw, ix), bin.width);
      if (!x.valid) continue;
      sum += y.low_weight * x.low_weight * static_cast<A>(low[x.low]) +
             y.low_weight * x.high_weight * static_cast<A>(low[x.high]) +
             y.high_weight * x.low_weight * static_cast<A>(high[x.low]) +
             y.high_weight * x.high_weight * static_cast<A>(high[x.high]);
    }
  }
  return static_cast<T>(sum / bin.samples);
}

// A warp processes a bin; each lane processes V channels at a time, 16 bytes if possible.
template <typename T, int V>
__global__ void __launch_bounds__(kPoolThreads)
    pool_channels_last(Pyramid<const T> pyramid, const accumulate_t<T>* boxes, int64_t bins,
                       RoiAlignParams params, T* out) {
  using A = accumulate_t<T>;
  const int64_t channels = pyramid.channels, lane = threadIdx.x % 32;
  for (int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; index < bins;
       index += int64_t{gridDim.x} * kWarps) {
    const int64_t pw = index % params.pooled_width, ph = index / params.pooled_width % params.pooled_height;
    const int64_t k = index / params.pooled_width / params.pooled_height;
    const Bin<A> bin = find_bin(pyramid, boxes + k * 5, params);
    const T* map =
        bin.usable ? pyramid.data[bin.level] + bin.image * channels * bin.height * bin.width : nullptr;
    for (int64_t first = 0; first < channels; first += 32 * V) {
      const int64_t c = first + lane * V;
      const bool active = c < channels;
      A sum[V] = {};
      if (bin.usable) {
        visit_pixels(bin, ph, pw, [&](int64_t row, int64_t column, A weight) {
          if (!active) return;
          const auto pack =
              *reinterpret_cast<const Pack<T, V>*>(map + (row * bin.width + column) * channels + c);
          PANFPN_UNROLL
          for (int v = 0; v < V; ++v) sum[v] += weight * static_cast<A>(pack.values[v]);
        });
      }
      if (!active) continue;
      Pack<T, V> pack;
      PANFPN_UNROLL
      for (int v = 0; v < V; ++v) pack.values[v] = static_cast<T>(sum[v] / bin.samples);
      *reinterpret_cast<Pack<T, V>*>(out + index * channels + c) = pack;
    }
  }
}

// A row or column, and the summed weight of the samples of a bin that touch it.
template <typename A>
struct alignas(2 * sizeof(A)) Tap {
  int pixel;
  A weight;
};

// The maximum number of taps of a bin: two for each sample.
template <typename A>
__device__ int64_t tap_slots(const RoiAxis<A>& axis) {
  return 2 * axis.grid;
}

// Finds the taps of one bin and returns their number; the remaining slots become zero. Neighbouring samples
// share pixels, and their taps are merged.
template <typename A>
__device__ int find_taps(const RoiAxis<A>& axis, int bin_index, int64_t size, Tap<A>* taps) {
  int count = 0;
  const auto add = [&](int64_t pixel, A weight) {
    if (weight == A(0)) return;
    for (int i = count - 1; i >= 0 && i >= count - 2; --i) {
      if (taps[i].pixel != pixel) continue;
      taps[i].weight += weight;
      return;
    }
    taps[count++] = {static_cast<int>(pixel), weight};
  };
  for (int64_t i = 0; i < axis.grid; ++i) {
    const Taps<A> sample = bilinear_taps(axis.sample(bin_index, i), size);
    if (!sample.valid) continue;
    add(sample.low, sample.low_weight);
    add(sample.high, sample.high_weight);
  }
  for (int i = count; i < tap_slots(axis); ++i) taps[i] = {0, A(0)};
  return count;
}

// Returns whether the taps of all bins fit in shared memory and pixel indices fit in 32 bits.
template <typename A>
__device__ bool taps_fit(const Bin<A>& bin, const RoiAlignParams& params) {
  return tap_slots(bin.y) <= kAxisTaps / params.pooled_height &&
         tap_slots(bin.x) <= kAxisTaps / params.pooled_width && tap_slots(bin.x) < kPlaneSums &&
         bin.height * bin.width < int64_t{1} << 31;
}

// A box, as a block computes it.
template <typename A>
struct BoxTaps {
  const Tap<A>*rows, *columns;  // the slots of all bins, bin by bin
  const int* row_counts;        // taps of each bin
  int row_slots, column_slots;
  int bins, pooled_width;
  int map_width;
  A samples;
};

// One warp pools the bins of a box in kPlanes channels. First each lane takes one column tap of a bin and
// sums over the rows; then each lane takes a bin and sums over its columns.
template <typename T>
__device__ void pool_planes(const BoxTaps<accumulate_t<T>>& box, const T* plane, int64_t plane_size, int used,
                            accumulate_t<T>* sums, T* out) {
  using A = accumulate_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int pitch = box.column_slots + 1;  // odd, so that bins start in different banks
  const int bins_at_once = kPlaneSums / pitch;
  for (int begin = 0; begin < box.bins; begin += bins_at_once) {
    const int count = min(bins_at_once, box.bins - begin);
    for (unsigned item = lane; item < static_cast<unsigned>(count * box.column_slots); item += 32) {
      const unsigned i = item / static_cast<unsigned>(box.column_slots), slot = item - i * box.column_slots;
      const unsigned ph = (begin + i) / static_cast<unsigned>(box.pooled_width);
      const unsigned pw = begin + i - ph * box.pooled_width;
      const Tap<A> column = box.columns[pw * box.column_slots + slot];
      const Tap<A>* rows = box.rows + ph * box.row_slots;
      const int row_count = column.weight == A(0) ? 0 : box.row_counts[ph];
      A sum[kPlanes] = {};
      PANFPN_UNROLL_BY(2)
      for (int j = 0; j < row_count; ++j) {
        const Tap<A> row = rows[j];
        const T* pixel = plane + (row.pixel * box.map_width + column.pixel);
        PANFPN_UNROLL
        for (int p = 0; p < kPlanes; ++p) {
          if (p < used) sum[p] += row.weight * static_cast<A>(pixel[p * plane_size]);
        }
      }
      PANFPN_UNROLL
      for (int p = 0; p < kPlanes; ++p) sums[p * kPlaneSums + i * pitch + slot] = sum[p] * column.weight;
    }
    __syncwarp();
    for (int i = lane; i < count; i += 32) {
      A sum[kPlanes] = {};
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
    pool_nchw(Pyramid<const T> pyramid, const accumulate_t<T>* boxes, int64_t count, RoiAlignParams params,
              T* out) {
  using A = accumulate_t<T>;
  PANFPN_SHARED(Tap<A>, rows, kAxisTaps);
  PANFPN_SHARED(Tap<A>, columns, kAxisTaps);
  PANFPN_SHARED(int, row_counts, kAxisTaps / 2);
  PANFPN_SHARED(A, sums, kWarps * kPlanes * kPlaneSums);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int64_t channels = pyramid.channels, shares = (channels + kBlockChannels - 1) / kBlockChannels;
  const int64_t bins = params.pooled_height * params.pooled_width;
  for (int64_t index = blockIdx.x; index < count * shares; index += gridDim.x) {
    const int64_t k = index / shares, first = index % shares * kBlockChannels;
    const int64_t last = min(first + kBlockChannels, channels);
    const Bin<A> bin = find_bin(pyramid, boxes + k * 5, params);
    const int64_t plane_size = bin.height * bin.width;
    const T* map = pyramid.data[bin.level] + bin.image * channels * plane_size;
    T* box_out = out + k * channels * bins;
    if (!bin.usable || !taps_fit(bin, params)) {
      for (int64_t i = first * bins + thread; i < last * bins; i += kPoolThreads) {
        const int64_t c = i / bins, ph = i % bins / params.pooled_width, pw = i % params.pooled_width;
        box_out[i] = bin.usable ? pool_bin(bin, map + c * plane_size, ph, pw) : static_cast<T>(0);
      }
      continue;
    }
    const int pooled_height = static_cast<int>(params.pooled_height);
    const BoxTaps<A> box{rows,
                         columns,
                         row_counts,
                         static_cast<int>(tap_slots(bin.y)),
                         static_cast<int>(tap_slots(bin.x)),
                         static_cast<int>(bins),
                         static_cast<int>(params.pooled_width),
                         static_cast<int>(bin.width),
                         bin.samples};
    for (int i = thread; i < pooled_height + box.pooled_width; i += kPoolThreads) {
      const bool is_row = i < pooled_height;
      const int pw = i - pooled_height;
      Tap<A>* taps = is_row ? rows + i * box.row_slots : columns + pw * box.column_slots;
      const RoiAxis<A> axis{is_row ? bin.y.start : bin.x.start, is_row ? bin.y.bin : bin.x.bin,
                            is_row ? bin.y.grid : bin.x.grid};
      const int found = find_taps(axis, is_row ? i : pw, is_row ? bin.height : bin.width, taps);
      if (is_row) row_counts[i] = found;
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

}  // namespace

Tensor pool_features(const std::vector<Tensor>& features, const std::vector<double>& scales,
                     const Tensor& boxes_in, const RoiAlignParams& params, const char* op) {
  const DeviceGuard guard(features[0].get_device_index());
  const DenseFeatures dense = dense_features(features);
  const Tensor boxes = torch::stable::contiguous(boxes_in);
  const int64_t channels = features[0].size(1),
                bins = boxes.size(0) * params.pooled_height * params.pooled_width;
  Tensor out = empty_nchw({boxes.size(0), channels, params.pooled_height, params.pooled_width}, features[0],
                          dense.channels_last);
  const auto stream = current_stream(out);
  dispatch_feature_type(features[0].scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Pyramid<const T> pyramid = make_pyramid<T>(dense.maps, scales);
    const auto* boxes_data = boxes.const_data_ptr<accumulate_t<T>>();
    T* out_data = out.mutable_data_ptr<T>();
    if (dense.channels_last) {
      constexpr int V = 16 / sizeof(T);
      bool packs = takes_packs<T, V>(channels, {out_data});
      for (int level = 0; level < pyramid.levels; ++level) {
        packs &= takes_packs<T, V>(channels, {pyramid.data[level]});
      }
      const auto launch = [&](auto* kernel) {
        PANFPN_LAUNCH(kernel, dim3(blocks_for(bins, kWarps)), dim3(kPoolThreads), 0, stream, pyramid,
                      boxes_data, bins, params, out_data);
      };
      packs ? launch(pool_channels_last<T, V>) : launch(pool_channels_last<T, 1>);
    } else {
      const int64_t shares = (channels + kBlockChannels - 1) / kBlockChannels;
      PANFPN_LAUNCH(pool_nchw<T>, dim3(blocks_for(boxes.size(0) * shares, 1)), dim3(kPoolThreads), 0, stream,
                    pyramid, boxes_data, boxes.size(0), params, out_data);
    }
  });
  return out;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// One kernel for one level and for many. Channels-last: a warp computes the weights of a cell's pixels once
// and its lanes split the channels, 16 bytes each. NCHW: a block computes the weights of a box's rows and
// columns once for some of the channels, and lanes read neighbouring columns.
#include "ops/cuda/roi_pool.h"

#include "ops/cuda/launch.cuh"
#include "ops/cuda/roi_cell.cuh"

namespace panfpn {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kWarps = kPoolThreads / 32;

// NCHW.
constexpr int kPlanes = 4;  // channels of a warp at a time, so that weights are loaded for all of them
constexpr int kBlockChannels = 64;
constexpr int kAxisTaps = 768;  // enough for 48 samples in each of 7 cells, along either axis
constexpr int kPlaneSums = 256;

// Mean of the cell's samples in the channel plane at `plane`.
template <typename T>
__device__ T pool_cell(const Cell<accumulate_t<T>>& cell, const T* plane, int64_t ph, int64_t pw) {
  using A = accumulate_t<T>;
  const SampleRange rows = samples_on_map(cell.y, ph, cell.height),
                    columns = samples_on_map(cell.x, pw, cell.width);
  A sum = 0;
  for (int64_t iy = rows.begin; iy < rows.end; ++iy) {
    const Taps<A> y = bilinear_taps(cell.y.sample(ph, iy), cell.height);
    if (!y.valid) continue;
    const T *low = plane + y.low * cell.width, *high = plane + y.high * cell.width;
    for (int64_t ix = columns.begin; ix < columns.end; ++ix) {
      const Taps<A> x = bilinear_taps(cell.x.sample(pw, ix), cell.width);
      if (!x.valid) continue;
      sum += y.low_weight * x.low_weight * static_cast<A>(low[x.low]) +
             y.low_weight * x.high_weight * static_cast<A>(low[x.high]) +
             y.high_weight * x.low_weight * static_cast<A>(high[x.low]) +
             y.high_weight * x.high_weight * static_cast<A>(high[x.high]);
    }
  }
  return static_cast<T>(sum * cell.scale);
}

// A warp takes a cell; each lane takes V channels of it at a time, V being 16 bytes' worth where it can.
template <typename T, int V>
__global__ void __launch_bounds__(kPoolThreads)
    pool_channels_last(Pyramid<const T> pyramid, const accumulate_t<T>* boxes, int64_t cells,
                       RoiAlignParams params, T* out) {
  using A = accumulate_t<T>;
  const int64_t channels = pyramid.channels, lane = threadIdx.x % 32;
  for (int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; index < cells;
       index += int64_t{gridDim.x} * kWarps) {
    const int64_t pw = index % params.pooled_width, ph = index / params.pooled_width % params.pooled_height;
    const int64_t k = index / params.pooled_width / params.pooled_height;
    const Cell<A> cell = find_cell(pyramid, boxes + k * 5, params);
    const T* map =
        cell.usable ? pyramid.data[cell.level] + cell.image * channels * cell.height * cell.width : nullptr;
    for (int64_t first = 0; first < channels; first += 32 * V) {
      const int64_t c = first + lane * V;
      const bool active = c < channels;
      A sum[V] = {};
      if (cell.usable) {
        visit_pixels(cell, ph, pw, [&](int64_t row, int64_t column, A weight) {
          if (!active) return;
          const auto pack =
              *reinterpret_cast<const Pack<T, V>*>(map + (row * cell.width + column) * channels + c);
          PANFPN_UNROLL
          for (int v = 0; v < V; ++v) sum[v] += weight * static_cast<A>(pack.values[v]);
        });
      }
      if (!active) continue;
      Pack<T, V> pack;
      PANFPN_UNROLL
      for (int v = 0; v < V; ++v) pack.values[v] = static_cast<T>(sum[v]);
      *reinterpret_cast<Pack<T, V>*>(out + index * channels + c) = pack;
    }
  }
}

// A row or column and the weight with which the samples of a cell touch it.
template <typename A>
struct alignas(2 * sizeof(A)) Tap {
  int pixel;
  A weight;
};

// Room for the taps of a cell: two for each sample.
template <typename A>
__device__ int64_t tap_slots(const RoiAxis<A>& axis) {
  return 2 * axis.grid;
}

// Finds the taps of one cell and returns how many there are; the other slots become zero. Neighbouring
// samples share pixels, and shared ones are merged.
template <typename A>
__device__ int find_taps(const RoiAxis<A>& axis, int cell_index, int64_t size, Tap<A>* taps) {
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
    const Taps<A> sample = bilinear_taps(axis.sample(cell_index, i), size);
    if (!sample.valid) continue;
    add(sample.low, sample.low_weight);
    add(sample.high, sample.high_weight);
  }
  for (int i = count; i < tap_slots(axis); ++i) taps[i] = {0, A(0)};
  return count;
}

// Whether the taps of all cells have room in shared memory, and pixels of a map numbers of 32 bits.
template <typename A>
__device__ bool taps_fit(const Cell<A>& cell, const RoiAlignParams& params) {
  return tap_slots(cell.y) <= kAxisTaps / params.pooled_height &&
         tap_slots(cell.x) <= kAxisTaps / params.pooled_width && tap_slots(cell.x) < kPlaneSums &&
         cell.height * cell.width < int64_t{1} << 31;
}

// What a block knows of a box.
template <typename A>
struct BoxTaps {
  const Tap<A>*rows, *columns;  // slots of each cell in turn
  const int* row_counts;        // of each cell
  int row_slots, column_slots;
  int cells, pooled_width;
  int map_width;
  A scale;
};

// The cells of a box in kPlanes channels, by one warp: first a lane has one tap of the columns of a cell, and
// sums over the rows; then it has a cell, and sums over the columns.
template <typename T>
__device__ void pool_planes(const BoxTaps<accumulate_t<T>>& box, const T* plane, int64_t plane_size, int used,
                            accumulate_t<T>* sums, T* out) {
  using A = accumulate_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int pitch = box.column_slots + 1;  // odd, so that cells begin in different banks
  const int cells_at_once = kPlaneSums / pitch;
  for (int begin = 0; begin < box.cells; begin += cells_at_once) {
    const int count = min(cells_at_once, box.cells - begin);
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
        if (p < used) out[int64_t{p} * box.cells + begin + i] = static_cast<T>(sum[p] * box.scale);
      }
    }
    __syncwarp();
  }
}

// A block takes a box and kBlockChannels of its channels. Three blocks share a multiprocessor.
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
  const int64_t cells = params.pooled_height * params.pooled_width;
  for (int64_t index = blockIdx.x; index < count * shares; index += gridDim.x) {
    const int64_t k = index / shares, first = index % shares * kBlockChannels;
    const int64_t last = min(first + kBlockChannels, channels);
    const Cell<A> cell = find_cell(pyramid, boxes + k * 5, params);
    const int64_t plane_size = cell.height * cell.width;
    const T* map = pyramid.data[cell.level] + cell.image * channels * plane_size;
    T* box_out = out + k * channels * cells;
    if (!cell.usable || !taps_fit(cell, params)) {
      for (int64_t i = first * cells + thread; i < last * cells; i += kPoolThreads) {
        const int64_t c = i / cells, ph = i % cells / params.pooled_width, pw = i % params.pooled_width;
        box_out[i] = cell.usable ? pool_cell(cell, map + c * plane_size, ph, pw) : static_cast<T>(0);
      }
      continue;
    }
    const int pooled_height = static_cast<int>(params.pooled_height);
    const BoxTaps<A> box{rows,
                         columns,
                         row_counts,
                         static_cast<int>(tap_slots(cell.y)),
                         static_cast<int>(tap_slots(cell.x)),
                         static_cast<int>(cells),
                         static_cast<int>(params.pooled_width),
                         static_cast<int>(cell.width),
                         cell.scale};
    for (int i = thread; i < pooled_height + box.pooled_width; i += kPoolThreads) {
      const bool is_row = i < pooled_height;
      const int pw = i - pooled_height;
      Tap<A>* taps = is_row ? rows + i * box.row_slots : columns + pw * box.column_slots;
      const RoiAxis<A> axis{is_row ? cell.y.start : cell.x.start, is_row ? cell.y.cell : cell.x.cell,
                            is_row ? cell.y.grid : cell.x.grid};
      const int found = find_taps(axis, is_row ? i : pw, is_row ? cell.height : cell.width, taps);
      if (is_row) row_counts[i] = found;
    }
    __syncthreads();
    for (int64_t c = first + warp * kPlanes; c < last; c += kWarps * kPlanes) {
      const int used = static_cast<int>(min(last - c, int64_t{kPlanes}));
      pool_planes(box, map + c * plane_size, plane_size, used, sums + warp * kPlanes * kPlaneSums,
                  box_out + c * cells);
    }
    __syncthreads();  // before the taps of the next box
  }
}

}  // namespace

Tensor pool_features(const std::vector<Tensor>& features, const std::vector<double>& scales,
                     const Tensor& boxes_in, const RoiAlignParams& params, const char* op) {
  const DeviceGuard guard(features[0].get_device_index());
  const DenseFeatures dense = dense_features(features);
  const Tensor boxes = torch::stable::contiguous(boxes_in);
  const int64_t channels = features[0].size(1),
                cells = boxes.size(0) * params.pooled_height * params.pooled_width;
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
        PANFPN_LAUNCH(kernel, dim3(blocks_for(cells, kWarps)), dim3(kPoolThreads), 0, stream, pyramid,
                      boxes_data, cells, params, out_data);
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

}  // namespace panfpn

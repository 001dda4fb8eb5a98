// One kernel for one level and for many. Channels-last: a warp computes the weights of a cell's pixels once
// and its lanes split the channels, 16 bytes each. NCHW: a thread per output value.
#include "ops/cuda/roi_pool.h"

#include "ops/cuda/launch.cuh"
#include "ops/cuda/roi_cell.cuh"

namespace panfpn {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kWarps = kPoolThreads / 32;

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

template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_nchw(Pyramid<const T> pyramid, const accumulate_t<T>* boxes, int64_t values, RoiAlignParams params,
              T* out) {
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; index < values;
       index += int64_t{gridDim.x} * blockDim.x) {
    const int64_t pw = index % params.pooled_width, ph = index / params.pooled_width % params.pooled_height;
    const int64_t plane = index / params.pooled_width / params.pooled_height;
    const int64_t c = plane % pyramid.channels, k = plane / pyramid.channels;
    const auto cell = find_cell(pyramid, boxes + k * 5, params);
    out[index] = cell.usable ? pool_cell(cell,
                                         pyramid.data[cell.level] +
                                             (cell.image * pyramid.channels + c) * cell.height * cell.width,
                                         ph, pw)
                             : static_cast<T>(0);
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
      PANFPN_LAUNCH(pool_nchw<T>, dim3(blocks_for(cells * channels, kPoolThreads)), dim3(kPoolThreads), 0,
                    stream, pyramid, boxes_data, cells * channels, params, out_data);
    }
  });
  return out;
}

}  // namespace panfpn

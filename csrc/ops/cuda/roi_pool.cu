// One kernel for one level and for many. Channels-last: the threads of a block share a cell and split its
// channels, so that each sample reads consecutive memory. NCHW: a thread per output value.
#include "ops/cuda/roi_pool.h"

#include "ops/cuda/launch.cuh"

namespace panfpn {
namespace {

constexpr int kPoolThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

// Where one cell of one box lies.
template <typename T>
struct Cell {
  using A = accumulate_t<T>;
  const T* map;  // first channel of the box's image on its level; null where the cell is zero
  int64_t height, width;
  RoiAxis<A> y, x;
  SampleRange rows, columns;
  A scale;
};

template <typename T>
__device__ Cell<T> find_cell(const Pyramid<T>& pyramid, const accumulate_t<T>* box,
                             const RoiAlignParams& params, int64_t ph, int64_t pw) {
  using A = accumulate_t<T>;
  Cell<T> cell{};
  const bool in_batch = box[0] >= A(0) && box[0] < static_cast<A>(pyramid.batch);  // false for NaN
  if (!in_batch) return cell;
  const int level = level_of_box(params.rule, pyramid.levels, box[1], box[2], box[3], box[4]);
  cell.height = pyramid.height[level];
  cell.width = pyramid.width[level];
  const A map_scale = static_cast<A>(pyramid.scale[level]);
  cell.y =
      make_roi_axis(box[2], box[4], map_scale, params.pooled_height, params.sampling_ratio, params.aligned);
  cell.x =
      make_roi_axis(box[1], box[3], map_scale, params.pooled_width, params.sampling_ratio, params.aligned);
  if (cell.y.grid <= 0 || cell.x.grid <= 0 || cell.height == 0 || cell.width == 0) return cell;
  cell.rows = samples_on_map(cell.y, ph, cell.height);
  cell.columns = samples_on_map(cell.x, pw, cell.width);
  cell.scale = A(1) / (static_cast<A>(cell.y.grid) * static_cast<A>(cell.x.grid));
  cell.map = pyramid.data[level] + static_cast<int64_t>(box[0]) * pyramid.channels * cell.height * cell.width;
  return cell;
}

// Mean of the cell's samples in the channel plane at `plane`, whose pixels lie `pixel_stride` apart.
template <typename T>
__device__ T pool_cell(const Cell<T>& cell, const T* plane, int64_t pixel_stride, int64_t ph, int64_t pw) {
  using A = accumulate_t<T>;
  A sum = 0;
  for (int64_t iy = cell.rows.begin; iy < cell.rows.end; ++iy) {
    const Taps<A> y = bilinear_taps(cell.y.sample(ph, iy), cell.height);
    if (!y.valid) continue;
    const T* low = plane + y.low * cell.width * pixel_stride;
    const T* high = plane + y.high * cell.width * pixel_stride;
    for (int64_t ix = cell.columns.begin; ix < cell.columns.end; ++ix) {
      const Taps<A> x = bilinear_taps(cell.x.sample(pw, ix), cell.width);
      if (!x.valid) continue;
      const int64_t left = x.low * pixel_stride, right = x.high * pixel_stride;
      sum += y.low_weight * x.low_weight * static_cast<A>(low[left]) +
             y.low_weight * x.high_weight * static_cast<A>(low[right]) +
             y.high_weight * x.low_weight * static_cast<A>(high[left]) +
             y.high_weight * x.high_weight * static_cast<A>(high[right]);
    }
  }
  return static_cast<T>(sum * cell.scale);
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_channels_last(Pyramid<T> pyramid, const accumulate_t<T>* boxes, int64_t cells, RoiAlignParams params,
                       T* out) {
  for (int64_t index = blockIdx.x; index < cells; index += gridDim.x) {
    const int64_t pw = index % params.pooled_width, ph = index / params.pooled_width % params.pooled_height;
    const int64_t k = index / params.pooled_width / params.pooled_height;
    const Cell<T> cell = find_cell(pyramid, boxes + k * 5, params, ph, pw);
    for (int64_t c = threadIdx.x; c < pyramid.channels; c += blockDim.x) {
      out[index * pyramid.channels + c] =
          cell.map != nullptr ? pool_cell(cell, cell.map + c, pyramid.channels, ph, pw) : static_cast<T>(0);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads) pool_nchw(Pyramid<T> pyramid, const accumulate_t<T>* boxes,
                                                          int64_t values, RoiAlignParams params, T* out) {
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; index < values;
       index += int64_t{gridDim.x} * blockDim.x) {
    const int64_t pw = index % params.pooled_width, ph = index / params.pooled_width % params.pooled_height;
    const int64_t plane = index / params.pooled_width / params.pooled_height;
    const int64_t c = plane % pyramid.channels, k = plane / pyramid.channels;
    const Cell<T> cell = find_cell(pyramid, boxes + k * 5, params, ph, pw);
    out[index] = cell.map != nullptr ? pool_cell(cell, cell.map + c * cell.height * cell.width, 1, ph, pw)
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
    const Pyramid<T> pyramid = make_pyramid<T>(dense.maps, scales);
    const auto* boxes_data = boxes.const_data_ptr<accumulate_t<T>>();
    if (dense.channels_last) {
      const int64_t threads = channels < kPoolThreads ? (channels + 31) / 32 * 32 : kPoolThreads;
      PANFPN_LAUNCH(pool_channels_last<T>,
                    dim3(static_cast<unsigned>(cells < kMaxBlocks ? cells : kMaxBlocks)),
                    dim3(static_cast<unsigned>(threads)), 0, stream, pyramid, boxes_data, cells, params,
                    out.mutable_data_ptr<T>());
    } else {
      const int64_t values = cells * channels, blocks = (values + kPoolThreads - 1) / kPoolThreads;
      PANFPN_LAUNCH(pool_nchw<T>, dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)),
                    dim3(kPoolThreads), 0, stream, pyramid, boxes_data, values, params,
                    out.mutable_data_ptr<T>());
    }
  });
  return out;
}

}  // namespace panfpn

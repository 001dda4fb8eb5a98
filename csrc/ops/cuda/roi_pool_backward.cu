// Two algorithms for the same sums. Both take `grad` in channels-last layout.
//
// Fast: a block processes a box, as in forward, and adds its pixels to float32 maps with vector atomics.
// Deterministic: a block processes a tile of pixels and some channels. It visits the boxes that overlap the
// tile, in their order, and keeps the sums in registers. It needs no extra memory except six integers per
// box.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/roi_taps.cuh"
#include "ops/roi_pool.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ void add_pack(float* to, const Pack<float, 1>& pack) {
  atomicAdd(to, pack.values[0]);
}
__device__ void add_pack(float* to, const Pack<float, 4>& pack) {
#if defined(PANFPN_CUDA_ON_HOST) || __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(to),
            make_float4(pack.values[0], pack.values[1], pack.values[2], pack.values[3]));
#else
  for (int v = 0; v < 4; ++v) atomicAdd(to + v, pack.values[v]);
#endif
}

// A warp's column of bins, in V channels of each lane; `map` and `grad` point to the first of these.
template <typename T>
struct GradColumn {
  const T* grad;
  int64_t grad_step;
  const Tap *rows, *columns;
  const int* row_counts;
  int bin_rows, count;
  float* map;
};

// Adjacent bins often share a row of pixels, and their gradients are added before they are sent to the map.
template <typename T, int V, int kCount>
__device__ __forceinline__ void add_column(const BlockBox& box, const GradColumn<T>& column) {
  const ColumnTaps<kCount> columns(column.columns, column.count);
  const float samples = box.samples, inverse_samples = box.inverse_samples;
  const int row_slots = box.row_slots;
  const Tap* rows = column.rows;
  const T* grad = column.grad;
  int row_offset = -1;  // of the row that is being summed
  float row_sum[V] = {};
  const auto send = [&] {
    if (row_offset < 0) return;
    char* line = reinterpret_cast<char*>(column.map) + static_cast<unsigned>(row_offset);
    columns.for_each([&](const Tap& tap) {
      Pack<float, V> pack;
      PANFPN_UNROLL
      for (int v = 0; v < V; ++v) pack.values[v] = tap.weight * row_sum[v];
      add_pack(reinterpret_cast<float*>(line + static_cast<unsigned>(tap.pixel)), pack);
    });
  };
  PANFPN_UNROLL_BY(1)
  for (int ph = 0; ph < column.bin_rows; ++ph) {
    const auto pack = *reinterpret_cast<const Pack<T, V>*>(grad);
    float shares[V];
    PANFPN_UNROLL
    for (int v = 0; v < V; ++v) {
      shares[v] = mean<float>(static_cast<float>(pack.values[v]), samples, inverse_samples);
    }
    const Tap* rows_end = rows + column.row_counts[ph];
    PANFPN_UNROLL_BY(1)
    for (const Tap* next = rows; next != rows_end; ++next) {
      const Tap row = *next;
      if (row.pixel != row_offset) {
        send();
        row_offset = row.pixel;
        PANFPN_UNROLL
        for (int v = 0; v < V; ++v) row_sum[v] = 0.0f;
      }
      PANFPN_UNROLL
      for (int v = 0; v < V; ++v) row_sum[v] += row.weight * shares[v];
    }
    rows += row_slots;
    grad += column.grad_step;
  }
  send();
}

// Adds the gradients of those boxes of a block that do not fit, sample by sample. (Inlined: without it, nvcc
// would not know that the atomics are on global memory.)
template <typename T, int V>
__device__ void add_other_boxes(const T* grad, const Pyramid<float>& sums, const float* boxes, int64_t count,
                                const RoiAlignParams& params) {
  const int64_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int64_t k = blockIdx.x; k < count; k += gridDim.x) {
    const Bin<float> bin = find_bin(sums, boxes + k * 5, params);
    if (!bin.usable || box_fits<true>(bin, sums, params)) continue;
    float* map = sums.data[bin.level] + bin.image * sums.channels * bin.height * bin.width;
    for (int64_t pw = blockIdx.y * warps + warp; pw < params.pooled_width; pw += gridDim.y * warps) {
      for (int64_t c = (int64_t{blockIdx.z} * 32 + lane) * V; c < sums.channels;
           c += int64_t{gridDim.z} * 32 * V) {
        for (int64_t ph = 0; ph < params.pooled_height; ++ph) {
          const int64_t index = (k * params.pooled_height + ph) * params.pooled_width + pw;
          const auto values = *reinterpret_cast<const Pack<T, V>*>(grad + index * sums.channels + c);
          visit_samples(bin, ph, pw, [&](int64_t pixel, float weight) {
            if (weight == 0.0f) return;
            Pack<float, V> pack;
            PANFPN_UNROLL
            for (int v = 0; v < V; ++v) {
              pack.values[v] = weight * (static_cast<float>(values.values[v]) / bin.samples);
            }
            add_pack(map + pixel * sums.channels + c, pack);
          });
        }
      }
    }
  }
}

// Adds grad [K, pooled_height, pooled_width, C] to the float32 maps `sums` [N, H, W, C]. Blocks, warps and
// lanes share the work as in pool_channels_last.
template <typename T, int V>
__global__ void __launch_bounds__(32 * kMostColumns, 4)
    add_boxes(const T* grad, const __grid_constant__ Pyramid<float> sums, const float* boxes, int64_t count,
              const __grid_constant__ RoiAlignParams params) {
  PANFPN_SHARED(BlockBox, box, 1);
  PANFPN_SHARED(Tap, rows, kChannelsLastTaps);
  PANFPN_SHARED(Tap, columns, kChannelsLastTaps);
  PANFPN_SHARED(int, counts, kChannelsLastTaps + kMostColumns);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int64_t channels = sums.channels;
  bool others = false;
  for (int64_t k = blockIdx.x; k < count; k += gridDim.x) {
    for (int64_t first = int64_t{blockIdx.y} * warps; first < params.pooled_width;
         first += int64_t{gridDim.y} * warps) {
      if (warp == 0) {
        const Range block_columns{first, min(first + warps, params.pooled_width)};
        find_box_taps<true>(sums, boxes + k * 5, params, block_columns, box, rows, columns, counts);
      }
      __syncthreads();
      others |= !box->fits;
      const int64_t pw = first + warp;
      if (box->fits && pw < params.pooled_width) {
        const int bin_rows = static_cast<int>(params.pooled_height);
        for (int64_t c = (int64_t{blockIdx.z} * 32 + lane) * V; c < channels;
             c += int64_t{gridDim.z} * 32 * V) {
          const GradColumn<T> column{grad + (k * bin_rows * params.pooled_width + pw) * channels + c,
                                     params.pooled_width * channels,
                                     rows,
                                     columns + warp * box->column_slots,
                                     counts,
                                     bin_rows,
                                     counts[bin_rows + warp],
                                     sums.data[box->level] + box->map + c};
          with_column_count(column.count, [&](auto count_tag) {
            add_column<T, V, decltype(count_tag)::value>(*box, column);
          });
        }
      }
      __syncthreads();  // before the taps of the next box are written
    }
  }
  if (others) add_other_boxes<T, V>(grad, sums, boxes, count, params);
}

// sums [pixels, C] -> out in another dtype.
template <typename T>
__global__ void __launch_bounds__(kThreads) convert(const float* sums, int64_t count, T* out) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    out[i] = static_cast<T>(sums[i]);
  }
}

// sums [N, pixels, C] -> out [N, C, pixels], through tiles of 32 x 32, so that both sides are accessed in
// rows.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    convert_to_nchw(const float* sums, int64_t batch, int64_t pixels, int64_t channels, T* out) {
  using Row = float[33];
  PANFPN_SHARED(Row, tile, 32);
  const int64_t pixel_tiles = (pixels + 31) / 32, channel_tiles = (channels + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (int64_t index = blockIdx.x; index < batch * pixel_tiles * channel_tiles; index += gridDim.x) {
    const int64_t first_channel = index % channel_tiles * 32,
                  first_pixel = index / channel_tiles % pixel_tiles * 32,
                  image = index / channel_tiles / pixel_tiles;
    for (int i = warp; i < 32; i += kWarps) {
      const int64_t pixel = first_pixel + i, c = first_channel + lane;
      if (pixel < pixels && c < channels) tile[i][lane] = sums[(image * pixels + pixel) * channels + c];
    }
    __syncthreads();
    for (int i = warp; i < 32; i += kWarps) {
      const int64_t pixel = first_pixel + lane, c = first_channel + i;
      if (pixel < pixels && c < channels) {
        out[(image * channels + c) * pixels + pixel] = static_cast<T>(tile[lane][i]);
      }
    }
    __syncthreads();
  }
}

// The half-open range of pixels that a box can touch on its map; level is -1 if it touches none.
struct BoxRange {
  int level, top, bottom, left, right;
  int64_t image;
};

// A superset of the pixels that the samples along the axis touch, with a few more if coordinates are coarse.
__device__ void touched_range(const RoiAxis<float>& axis, int64_t bins, int64_t size, int* begin, int* end) {
  const double start = axis.start, stop = start + static_cast<double>(axis.bin) * static_cast<double>(bins);
  const double low = start < stop ? start : stop, high = start < stop ? stop : start;
  const double margin = 1.0 + 1e-6 * (fabs(low) + fabs(high)), last = static_cast<double>(size - 1);
  double first_pixel = floor(low - margin), last_pixel = floor(high + margin) + 1.0;
  if (first_pixel > last + 1.0 || last_pixel < -1.0) {
    *begin = *end = 0;
    return;
  }
  first_pixel = first_pixel < 0.0 ? 0.0 : (first_pixel > last ? last : first_pixel);
  last_pixel = last_pixel < 0.0 ? 0.0 : (last_pixel > last ? last : last_pixel);
  *begin = static_cast<int>(first_pixel);
  *end = static_cast<int>(last_pixel) + 1;
}

__global__ void __launch_bounds__(kThreads) find_ranges(PyramidShape shape, const float* boxes, int64_t count,
                                                        RoiAlignParams params, BoxRange* ranges) {
  for (int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x; k < count;
       k += int64_t{gridDim.x} * kThreads) {
    const Bin<float> bin = find_bin(shape, boxes + k * 5, params);
    BoxRange range{-1, 0, 0, 0, 0, 0};
    if (bin.usable) {
      range.level = bin.level;
      range.image = bin.image;
      touched_range(bin.y, params.pooled_height, bin.height, &range.top, &range.bottom);
      touched_range(bin.x, params.pooled_width, bin.width, &range.left, &range.right);
    }
    ranges[k] = range;
  }
}

constexpr int kTile = 8;    // pixels along each side; a warp processes a row
constexpr int kStaged = 4;  // boxes whose weights are computed together
constexpr int kBins = 32;   // bins along each axis whose weights are kept at once

// The summed weight of a bin's samples on one pixel.
__device__ float weight_on_pixel(const RoiAxis<float>& axis, int64_t bin, int64_t pixel, int64_t size) {
  const double low = pixel == 0 ? -1.0 : static_cast<double>(pixel - 1),
               high = static_cast<double>(pixel == size - 1 ? size : pixel + 1);
  Range range{0, axis.grid};
  if (axis.grid > 4) range = samples_between(axis, bin, low, high);
  float weight = 0.0f;
  for (int64_t i = range.begin; i < range.end; ++i) {
    const Taps<float> taps = bilinear_taps(axis.sample(bin, i), size);
    if (!taps.valid) continue;
    if (taps.low == pixel) weight += taps.low_weight;
    if (taps.high == pixel) weight += taps.high_weight;
  }
  return weight;
}

struct TileGrid {
  int64_t first[kMaxLevels + 1];  // index of the first tile of each level, then the number of all tiles
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    gather_tiles(const T* grad, Pyramid<T> out, bool channels_last, const float* boxes,
                 const BoxRange* ranges, int64_t count, TileGrid tiles, RoiAlignParams params) {
  using Weights = float[2][kTile][kBins];
  using Masks = unsigned[2][kTile];
  PANFPN_SHARED(int64_t, hits, kThreads);
  PANFPN_SHARED(int, hits_of_warp, kWarps);
  PANFPN_SHARED(Weights, weights, kStaged);  // for each axis (0 is y), on each pixel of the tile
  PANFPN_SHARED(Masks, touching, kStaged);   // bins whose weight is not zero
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t channels = out.channels, chunks = (channels + 32 * V - 1) / (32 * V);
  const int64_t most_bins =
      params.pooled_height > params.pooled_width ? params.pooled_height : params.pooled_width;
  const int segment = most_bins <= 8 ? 8 : (most_bins <= 16 ? 16 : 32);  // lanes for the bins of one pixel
  const int pixels_at_once = 32 / segment, groups = kTile / pixels_at_once;

  for (int64_t index = blockIdx.x; index < tiles.first[out.levels] * chunks; index += gridDim.x) {
    const int64_t c = index % chunks * 32 * V + lane * V, tile = index / chunks;
    const bool active = c < channels;
    int level = 0;
    while (tile >= tiles.first[level + 1]) ++level;
    const int64_t height = out.height[level], width = out.width[level];
    const int64_t across = (width + kTile - 1) / kTile, down = (height + kTile - 1) / kTile;
    const int64_t in_level = tile - tiles.first[level], image = in_level / across / down;
    const int64_t left = in_level % across * kTile, top = in_level / across % down * kTile;
    float sum[kTile][V] = {};

    for (int64_t base = 0; base < count; base += kThreads) {
      const int64_t k = base + threadIdx.x;
      bool hit = false;
      if (k < count) {
        const BoxRange range = ranges[k];
        hit = range.level == level && range.image == image && range.top < top + kTile && range.bottom > top &&
              range.left < left + kTile && range.right > left;
      }
      const unsigned votes = __ballot_sync(kFullWarp, hit);
      if (lane == 0) hits_of_warp[warp] = __popc(votes);
      __syncthreads();
      int before = 0, total = 0;
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += hits_of_warp[w];
        total += hits_of_warp[w];
      }
      if (hit) hits[before + __popc(votes & ((1u << lane) - 1u))] = k;
      __syncthreads();

      for (int first = 0; first < total; first += kStaged) {
        const int staged = total - first < kStaged ? total - first : kStaged;
        for (int64_t ph0 = 0; ph0 < params.pooled_height; ph0 += kBins) {
          for (int64_t pw0 = 0; pw0 < params.pooled_width; pw0 += kBins) {
            for (int item = warp; item < staged * 2 * groups; item += kWarps) {
              const int b = item / groups / 2, axis = item / groups % 2;
              const int pixel = item % groups * pixels_at_once + lane / segment, bin_lane = lane % segment;
              const Bin<float> bin = find_bin(out, boxes + hits[first + b] * 5, params);
              const int64_t at = (axis == 0 ? top : left) + pixel, size = axis == 0 ? height : width;
              const int64_t index_of_bin = (axis == 0 ? ph0 : pw0) + bin_lane;
              float weight = 0.0f;
              if (at < size && index_of_bin < (axis == 0 ? params.pooled_height : params.pooled_width)) {
                weight = weight_on_pixel(axis == 0 ? bin.y : bin.x, index_of_bin, at, size);
                if (axis == 0) weight /= bin.samples;
              }
              weights[b][axis][pixel][bin_lane] = weight;
              const unsigned nonzero = __ballot_sync(kFullWarp, weight != 0.0f) >> (lane / segment * segment);
              if (bin_lane == 0) {
                touching[b][axis][pixel] = segment == 32 ? nonzero : nonzero & ((1u << segment) - 1u);
              }
            }
            __syncthreads();
            for (int b = 0; b < staged && active; ++b) {
              unsigned columns = 0;
              for (int x = 0; x < kTile; ++x) columns |= touching[b][1][x];
              for (unsigned rows = touching[b][0][warp]; rows != 0; rows &= rows - 1) {
                const int i = __ffs(static_cast<int>(rows)) - 1;
                const float row_weight = weights[b][0][warp][i];
                for (unsigned rest = columns; rest != 0; rest &= rest - 1) {
                  const int j = __ffs(static_cast<int>(rest)) - 1;
                  const int64_t bin =
                      (hits[first + b] * params.pooled_height + ph0 + i) * params.pooled_width + pw0 + j;
                  const auto pack = *reinterpret_cast<const Pack<T, V>*>(grad + bin * channels + c);
                  PANFPN_UNROLL
                  for (int x = 0; x < kTile; ++x) {
                    const float weight = row_weight * weights[b][1][x][j];
                    if (weight == 0.0f) continue;
                    PANFPN_UNROLL
                    for (int v = 0; v < V; ++v) sum[x][v] += weight * static_cast<float>(pack.values[v]);
                  }
                }
              }
            }
            __syncthreads();
          }
        }
      }
    }

    const int64_t y = top + warp;
    if (!active || y >= height) continue;
    PANFPN_UNROLL
    for (int i = 0; i < kTile; ++i) {
      const int64_t x = left + i;
      if (x >= width) continue;
      Pack<T, V> pack;
      PANFPN_UNROLL
      for (int v = 0; v < V; ++v) pack.values[v] = static_cast<T>(sum[i][v]);
      T* map = out.data[level] + image * channels * height * width;
      if (channels_last) {
        *reinterpret_cast<Pack<T, V>*>(map + (y * width + x) * channels + c) = pack;
      } else {
        PANFPN_UNROLL
        for (int v = 0; v < V; ++v) map[((c + v) * height + y) * width + x] = pack.values[v];
      }
    }
  }
}

template <typename T>
void backward_fast(const Tensor& grad, const std::vector<Tensor>& grads, const std::vector<double>& scales,
                   const Tensor& boxes, bool channels_last, const RoiAlignParams& params) {
  const auto stream = current_stream(grad);
  const bool in_place = channels_last && std::is_same_v<T, float>;
  std::vector<Tensor> sums = grads;
  for (Tensor& sum : sums) {
    if (!in_place) {
      const std::array<int64_t, 4> sizes{sum.size(0), sum.size(1), sum.size(2), sum.size(3)};
      sum = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()),
                                 ScalarType::Float, std::nullopt, grad.device(), std::nullopt,
                                 torch::headeronly::MemoryFormat::ChannelsLast);
    }
    torch::stable::zero_(sum);
  }
  const Pyramid<float> pyramid = make_grad_pyramid<float>(sums, scales);
  const T* grad_data = grad.const_data_ptr<T>();
  bool packs = takes_packs<T, 4>(pyramid.channels, {grad_data});
  for (int level = 0; level < pyramid.levels; ++level) {
    packs &= takes_packs<float, 4>(pyramid.channels, {pyramid.data[level]});
  }
  const auto launch = [&](auto* kernel, int64_t pack) {
    const auto [grid, block] = column_launch(boxes.size(0), pyramid.channels, pack, params);
    PANFPN_LAUNCH(kernel, grid, block, 0, stream, grad_data, pyramid, boxes.const_data_ptr<float>(),
                  boxes.size(0), params);
  };
  packs ? launch(add_boxes<T, 4>, 4) : launch(add_boxes<T, 1>, 1);
  for (int level = 0; level < pyramid.levels && !in_place; ++level) {
    T* out = grads[level].mutable_data_ptr<T>();
    const int64_t pixels = pyramid.height[level] * pyramid.width[level];
    if (channels_last) {
      const int64_t values = pyramid.batch * pixels * pyramid.channels;
      PANFPN_LAUNCH(convert<T>, dim3(blocks_for(values, kThreads)), dim3(kThreads), 0, stream,
                    pyramid.data[level], values, out);
    } else {
      const int64_t tiles = pyramid.batch * ((pixels + 31) / 32) * ((pyramid.channels + 31) / 32);
      PANFPN_LAUNCH(convert_to_nchw<T>, dim3(blocks_for(tiles, 1)), dim3(kThreads), 0, stream,
                    pyramid.data[level], pyramid.batch, pixels, pyramid.channels, out);
    }
  }
}

template <typename T>
void backward_deterministic(const Tensor& grad, const std::vector<Tensor>& grads,
                            const std::vector<double>& scales, const Tensor& boxes, bool channels_last,
                            const RoiAlignParams& params) {
  const auto stream = current_stream(grad);
  const Pyramid<T> pyramid = make_grad_pyramid<T>(grads, scales);
  const T* grad_data = grad.const_data_ptr<T>();
  const auto* boxes_data = boxes.const_data_ptr<float>();
  const int64_t count = boxes.size(0), bytes = static_cast<int64_t>(sizeof(BoxRange));
  Tensor memory = empty({count * bytes}, ScalarType::Byte, grad);
  auto* ranges = reinterpret_cast<BoxRange*>(memory.mutable_data_ptr<uint8_t>());
  PANFPN_LAUNCH(find_ranges, dim3(blocks_for(count, kThreads)), dim3(kThreads), 0, stream, pyramid,
                boxes_data, count, params, ranges);
  TileGrid tiles{};
  bool packs = takes_packs<T, 4>(pyramid.channels, {grad_data});
  for (int level = 0; level < pyramid.levels; ++level) {
    tiles.first[level + 1] = tiles.first[level] + pyramid.batch *
                                                      ((pyramid.height[level] + kTile - 1) / kTile) *
                                                      ((pyramid.width[level] + kTile - 1) / kTile);
    packs &= takes_packs<T, 4>(pyramid.channels, {pyramid.data[level]});
  }
  const auto launch = [&](auto* kernel, int64_t pack) {
    const int64_t chunks = (pyramid.channels + 32 * pack - 1) / (32 * pack);
    PANFPN_LAUNCH(kernel, dim3(blocks_for(tiles.first[pyramid.levels] * chunks, 1)), dim3(kThreads), 0,
                  stream, grad_data, pyramid, channels_last, boxes_data, ranges, count, tiles, params);
  };
  packs ? launch(gather_tiles<T, 4>, 4) : launch(gather_tiles<T, 1>, 1);
}

}  // namespace

std::vector<Tensor> pool_features_backward(const Tensor& grad_in, const std::vector<double>& scales,
                                           const Tensor& boxes_in, const MapSizes& sizes, bool channels_last,
                                           bool deterministic, const RoiAlignParams& params, const char* op) {
  const DeviceGuard guard(grad_in.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_in, torch::headeronly::MemoryFormat::ChannelsLast),
               boxes = torch::stable::contiguous(boxes_in);
  std::vector<Tensor> grads;
  for (size_t level = 0; level < scales.size(); ++level) {
    STD_TORCH_CHECK(sizes.heights[level] < INT32_MAX && sizes.widths[level] < INT32_MAX, op,
                    ": feature maps must have sides below 2^31");
    grads.push_back(empty_nchw({sizes.batch, grad.size(1), sizes.heights[level], sizes.widths[level]}, grad,
                               channels_last));
  }
  dispatch_feature_type(grad.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (deterministic) {
      backward_deterministic<T>(grad, grads, scales, boxes, channels_last, params);
    } else {
      backward_fast<T>(grad, grads, scales, boxes, channels_last, params);
    }
  });
  return grads;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

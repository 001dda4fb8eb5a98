// Channels-last maps are read in place, box by box. NCHW maps, and channels-last maps that many large boxes
// read again and again, are first copied to blocks of channels that fit into the cache and have the layout of
// the vector instructions; then all boxes are pooled from one block.
#include "ops/roi_pool.h"

#include <algorithm>

#include "ops/cpu/channel_block.h"
#include "ops/cpu/parallel.h"
#include "ops/cpu/roi_fold.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// A map or a part of it, with adjacent channels.
template <typename T>
struct MapView {
  const T* data;
  int64_t row_stride, pixel_stride;
  int64_t top, left;  // of the part

  const T* pixel(int64_t row, int64_t column) const {
    return data + (row - top) * row_stride + (column - left) * pixel_stride;
  }
};

// sum += weight * values, for V vectors at `from`.
template <typename T, typename A, int V>
PANFPN_ALWAYS_INLINE void multiply_add(const T* from, A weight, Lanes<A> (&sum)[V]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    Lanes<A> lanes;
    load_lanes(from + v * kLanes<A>, lanes);
    sum[v] += lanes * weight;
  }
}

// The weighted sum of V vectors at `offset` from each of `count` addresses.
template <typename T, typename A, int V>
PANFPN_ALWAYS_INLINE void sum_at(const T* const* addresses, const A* weights, int64_t count, int64_t offset,
                                 Lanes<A> (&sum)[V]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] = Lanes<A>{};
  for (int64_t i = 0; i < count; ++i) multiply_add<T, A, V>(addresses[i] + offset, weights[i], sum);
}

// The same for the last channels, fewer than a vector has lanes.
template <typename T, typename A>
PANFPN_ALWAYS_INLINE void sum_rest(const T* const* addresses, const A* weights, int64_t count, int64_t offset,
                                   int64_t rest, Lanes<A>& sum) {
  sum = Lanes<A>{};
  for (int64_t i = 0; i < count; ++i) {
    Lanes<A> lanes;
    load_some<T, A>(addresses[i] + offset, rest, lanes);
    sum += lanes * weights[i];
  }
}

template <typename A, int V>
PANFPN_ALWAYS_INLINE void store_all(Lanes<A> (&sum)[V], A* to) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store_lanes(sum[v], to + v * kLanes<A>);
}

// Weighted sums over `count` addresses for all channels -> `to`, whose channels are padded to whole vectors.
template <typename T, typename A>
PANFPN_ALWAYS_INLINE void sum_all_channels(const T* const* addresses, const A* weights, int64_t count,
                                           int64_t channels, A* to) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) {
    Lanes<A> sum[4];
    sum_at<T, A, 4>(addresses, weights, count, c, sum);
    store_all<A, 4>(sum, to + c);
  }
  for (; c + L <= channels; c += L) {
    Lanes<A> sum[1];
    sum_at<T, A, 1>(addresses, weights, count, c, sum);
    store_all<A, 1>(sum, to + c);
  }
  if (c < channels) {
    Lanes<A> sum;
    sum_rest<T, A>(addresses, weights, count, c, channels - c, sum);
    store_lanes(sum, to + c);
  }
}

// Memory that a thread reuses for all boxes.
template <typename T, typename A>
struct PoolScratch {
  std::vector<const T*> pixels;       // of the map, for one column
  std::vector<const A*> columns;      // of `line`, for one bin
  std::vector<A> weights, line, sum;  // line: one row of bins, folded along y: [columns, padded channels]
};

// Pools one box into `out` [pooled_height, pooled_width, channels].
template <typename T, typename A, typename Out>
PANFPN_VECTOR_CLONES void pool_box(const MapView<T>& map, const BoxFold<A>& box, int64_t channels,
                                   int64_t pooled_height, int64_t pooled_width, PoolScratch<T, A>& scratch,
                                   Out* out) {
  constexpr int L = kLanes<A>;
  const int64_t padded = (channels + L - 1) / L * L;
  const int64_t touched = static_cast<int64_t>(box.columns.pixels().size());
  const int64_t* columns = box.columns.pixels().data();
  const int64_t* rows = box.rows.pixels().data();
  scratch.line.resize(touched * padded);
  scratch.sum.resize(padded);
  for (int64_t ph = 0; ph < pooled_height; ++ph) {
    const auto* row = box.rows.begin(ph);
    const int64_t row_count = box.rows.end(ph) - row;
    scratch.pixels.resize(row_count);
    scratch.weights.resize(row_count);
    for (int64_t i = 0; i < row_count; ++i) scratch.weights[i] = row[i].weight;
    for (int64_t j = 0; j < touched; ++j) {
      for (int64_t i = 0; i < row_count; ++i) {
        scratch.pixels[i] = map.pixel(rows[row[i].slot], columns[j]);
      }
      sum_all_channels<T, A>(scratch.pixels.data(), scratch.weights.data(), row_count, channels,
                             scratch.line.data() + j * padded);
    }
    for (int64_t pw = 0; pw < pooled_width; ++pw) {
      const auto* column = box.columns.begin(pw);
      const int64_t column_count = box.columns.end(pw) - column;
      scratch.columns.resize(column_count);
      scratch.weights.resize(column_count);
      for (int64_t i = 0; i < column_count; ++i) {
        scratch.columns[i] = scratch.line.data() + column[i].slot * padded;
        scratch.weights[i] = column[i].weight;
      }
      A* sum = scratch.sum.data();
      sum_all_channels<A, A>(scratch.columns.data(), scratch.weights.data(), column_count, padded, sum);
      int64_t c = 0;
      for (; c + L <= channels; c += L) {
        Lanes<A> lanes;
        load_lanes(sum + c, lanes);
        store_lanes(lanes / box.samples, out + c);
      }
      if (c < channels) {
        Lanes<A> lanes;
        load_lanes(sum + c, lanes);
        store_some<Out, A>(lanes / box.samples, channels - c, out + c);
      }
      out += channels;
    }
  }
}

template <typename T>
void zero_unusable(const BoxFolds<accumulate_t<T>>& folds, int64_t count, int64_t out_size, T* out) {
  torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
    BoxFold<accumulate_t<T>> scratch;
    for (int64_t k = begin; k < end; ++k) {
      if (!folds.get(k, scratch).usable) std::fill(out + k * out_size, out + (k + 1) * out_size, T(0));
    }
  });
}

template <typename A>
using Group = typename BoxFolds<A>::Group;

// Pools box by box from channels-last maps in place.
template <typename T>
void pool_in_place(const Pyramid<const T>& pyramid, const BoxFolds<accumulate_t<T>>& folds,
                   const std::vector<Group<accumulate_t<T>>>& groups, const RoiAlignParams& params, T* out) {
  using A = accumulate_t<T>;
  std::vector<std::pair<int64_t, const T*>> work;  // a box, and the map of its image
  for (const auto& group : groups) {
    const int64_t map_size = pyramid.height[group.level] * pyramid.width[group.level] * pyramid.channels;
    for (const int64_t k : group.boxes)
      work.emplace_back(k, pyramid.data[group.level] + group.image * map_size);
  }
  parallel_in_chunks(static_cast<int64_t>(work.size()), 4, [&] {
    return [&, scratch = PoolScratch<T, A>(), fold = BoxFold<A>()](int64_t begin, int64_t end) mutable {
      for (int64_t i = begin; i < end; ++i) {
        const auto [k, map] = work[i];
        const BoxFold<A>& box = folds.get(k, fold);
        const MapView<T> view{map, pyramid.width[box.level] * pyramid.channels, pyramid.channels, 0, 0};
        pool_box<T, A, T>(view, box, pyramid.channels, params.pooled_height, params.pooled_width, scratch,
                          out + k * params.pooled_height * params.pooled_width * pyramid.channels);
      }
    };
  });
}

// Pools block by block of channels: all boxes of a map from one block before the next block.
template <typename T>
void pool_in_blocks(const Pyramid<const T>& pyramid, const BoxFolds<accumulate_t<T>>& folds,
                    const std::vector<Group<accumulate_t<T>>>& groups, const RoiAlignParams& params,
                    bool channels_last, T* out) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  const int64_t channels = pyramid.channels, blocks = (channels + L - 1) / L;
  const int64_t bins = params.pooled_height * params.pooled_width;
  parallel_in_chunks(static_cast<int64_t>(groups.size()) * blocks, 1, [&] {
    return [&, scratch = PoolScratch<A, A>(), fold = BoxFold<A>(), block = std::vector<A>(),
            pooled = std::vector<A>(bins * L)](int64_t task, int64_t) mutable {
      const auto& group = groups[task / blocks];
      const int64_t first = task % blocks * L, some = std::min<int64_t>(L, channels - first);
      const int64_t width = pyramid.width[group.level], plane = pyramid.height[group.level] * width;
      const int64_t block_width = group.right - group.left;
      block.resize((group.bottom - group.top) * block_width * L);
      const T* map = pyramid.data[group.level] + group.image * channels * plane;
      for (int64_t y = group.top; y < group.bottom; ++y) {
        A* const line = block.data() + (y - group.top) * block_width * L;
        const int64_t pixel = y * width + group.left;
        if (channels_last) {
          pixels_to_block<T, A>(map + pixel * channels + first, channels, some, block_width, line);
        } else {
          planes_to_block<T, A>(map + first * plane + pixel, plane, some, block_width, line);
        }
      }
      const MapView<A> view{block.data(), block_width * L, L, group.top, group.left};
      for (const int64_t k : group.boxes) {
        pool_box<A, A, A>(view, folds.get(k, fold), L, params.pooled_height, params.pooled_width, scratch,
                          pooled.data());
        if (channels_last) {
          block_to_pixels<T, A>(pooled.data(), bins, out + k * bins * channels + first, channels, some);
        } else {
          block_to_planes<T, A>(pooled.data(), bins, out + (k * channels + first) * bins, bins, some);
        }
      }
    };
  });
}

// Returns whether a channels-last map should be copied to blocks: it is too large for the cache, and its
// boxes read each pixel often enough to repay the copy.
template <typename T>
bool worth_blocks(const Group<accumulate_t<T>>& group, const BoxFolds<accumulate_t<T>>& folds,
                  int64_t channels) {
  constexpr int64_t kCacheBytes = 4 << 20, kReads = 8;
  const int64_t pixels = (group.bottom - group.top) * (group.right - group.left);
  if (pixels * channels * static_cast<int64_t>(sizeof(T)) <= kCacheBytes) return false;
  int64_t reads = 0;
  BoxFold<accumulate_t<T>> scratch;
  for (const int64_t k : group.boxes) {
    const auto& box = folds.get(k, scratch);
    reads += static_cast<int64_t>(box.rows.pixels().size() * box.columns.pixels().size());
  }
  return reads >= kReads * pixels;
}

}  // namespace

Tensor pool_features(const std::vector<Tensor>& features, const std::vector<double>& scales,
                     const Tensor& boxes_in, const RoiAlignParams& params, const char* op) {
  const DenseFeatures dense = dense_features(features);
  const Tensor boxes = torch::stable::contiguous(boxes_in);
  const int64_t count = boxes.size(0), channels = features[0].size(1);
  Tensor out = empty_nchw({count, channels, params.pooled_height, params.pooled_width}, features[0],
                          dense.channels_last);
  if (out.numel() == 0) return out;
  dispatch_floating(features[0].scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    const Pyramid<const T> pyramid = make_pyramid<T>(dense.maps, scales);
    const BoxFolds<A> folds(boxes.const_data_ptr<A>(), count, pyramid, params);
    T* out_data = out.mutable_data_ptr<T>();
    zero_unusable<T>(folds, count, channels * params.pooled_height * params.pooled_width, out_data);
    std::vector<Group<A>> in_place, in_blocks;
    for (auto& group : folds.groups()) {
      const bool cut = !dense.channels_last || worth_blocks<T>(group, folds, channels);
      (cut ? in_blocks : in_place).push_back(std::move(group));
    }
    pool_in_place<T>(pyramid, folds, in_place, params, out_data);
    pool_in_blocks<T>(pyramid, folds, in_blocks, params, dense.channels_last, out_data);
  });
  return out;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

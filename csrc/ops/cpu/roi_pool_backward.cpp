// Each task owns a block of channels of one map and adds all boxes to it, in the order of the groups. So no
// two threads write the same value, and the order of the sums never changes. A block is summed in float32
// (float64 for float64) with adjacent channels, whatever the layout and dtype of the map, and written to the
// map once.
#include <algorithm>

#include "ops/cpu/channel_block.h"
#include "ops/cpu/parallel.h"
#include "ops/cpu/roi_fold.h"
#include "ops/roi_pool.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// Adds the gradient of one box, `grad` [pooled_height, pooled_width, kLanes], to the map `block` [H, W,
// kLanes]. `line` is scratch for the box's columns.
template <typename A>
PANFPN_VECTOR_CLONES void add_box(const A* grad, const BoxFold<A>& box, int64_t pooled_height,
                                  int64_t pooled_width, int64_t map_width, A* line, A* block) {
  constexpr int L = kLanes<A>;
  const int64_t touched = static_cast<int64_t>(box.columns.pixels().size());
  const int64_t* columns = box.columns.pixels().data();
  const int64_t* rows = box.rows.pixels().data();
  for (int64_t ph = 0; ph < pooled_height; ++ph) {
    const auto *row = box.rows.begin(ph), *row_end = box.rows.end(ph);
    if (row == row_end) continue;
    std::memset(line, 0, static_cast<size_t>(touched * L) * sizeof(A));
    for (int64_t pw = 0; pw < pooled_width; ++pw) {
      Lanes<A> value;
      load_lanes(grad + (ph * pooled_width + pw) * L, value);
      value /= box.samples;
      const auto* column_end = box.columns.end(pw);
      for (const auto* column = box.columns.begin(pw); column != column_end; ++column) {
        Lanes<A> sum;
        load_lanes(line + column->slot * L, sum);
        sum += value * column->weight;
        store_lanes(sum, line + column->slot * L);
      }
    }
    for (; row != row_end; ++row) {
      A* map_row = block + rows[row->slot] * map_width * L;
      for (int64_t j = 0; j < touched; ++j) {
        Lanes<A> value, sum;
        load_lanes(line + j * L, value);
        load_lanes(map_row + columns[j] * L, sum);
        sum += value * row->weight;
        store_lanes(sum, map_row + columns[j] * L);
      }
    }
  }
}

// A block of channels of one map, to which the boxes of `group` are added. Without a group the gradient is
// zero.
template <typename A>
struct BackwardTask {
  int level;
  int64_t image, first_channel;
  const typename BoxFolds<A>::Group* group;
};

template <typename T>
void add_boxes(const T* grad, bool grad_channels_last, const Pyramid<T>& pyramid, bool channels_last,
               const BoxFolds<accumulate_t<T>>& folds, const RoiAlignParams& params) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  const int64_t channels = pyramid.channels, bins = params.pooled_height * params.pooled_width;
  const auto groups = folds.groups();
  std::vector<BackwardTask<A>> tasks;
  size_t next = 0;  // groups are ordered by level, then by image
  for (int level = 0; level < pyramid.levels; ++level) {
    for (int64_t image = 0; image < pyramid.batch; ++image) {
      const bool found = next < groups.size() && groups[next].level == level && groups[next].image == image;
      for (int64_t c = 0; c < channels; c += L) {
        tasks.push_back({level, image, c, found ? &groups[next] : nullptr});
      }
      next += found ? 1 : 0;
    }
  }
  parallel_in_chunks(static_cast<int64_t>(tasks.size()), 1, [&] {
    return [&, fold = BoxFold<A>(), block = std::vector<A>(), line = std::vector<A>(),
            box_grad = std::vector<A>(bins * L)](int64_t index, int64_t) mutable {
      const BackwardTask<A>& task = tasks[index];
      const int64_t first = task.first_channel, some = std::min<int64_t>(L, channels - first);
      const int64_t width = pyramid.width[task.level], pixels = pyramid.height[task.level] * width;
      block.assign(pixels * L, A(0));
      line.resize(width * 2 * L);
      if (task.group != nullptr) {
        for (const int64_t k : task.group->boxes) {
          const BoxFold<A>& box = folds.get(k, fold);
          line.resize(std::max(line.size(), box.columns.pixels().size() * L));
          const T* from = grad + k * bins * channels;
          if (grad_channels_last) {
            pixels_to_block<T, A>(from + first, channels, some, bins, box_grad.data());
          } else {
            planes_to_block<T, A>(from + first * bins, bins, some, bins, box_grad.data());
          }
          add_box<A>(box_grad.data(), box, params.pooled_height, params.pooled_width, width, line.data(),
                     block.data());
        }
      }
      T* map = pyramid.data[task.level] + task.image * channels * pixels;
      if (channels_last) {
        block_to_pixels<T, A>(block.data(), pixels, map + first, channels, some);
      } else {
        block_to_planes<T, A>(block.data(), pixels, map + first * pixels, pixels, some);
      }
    };
  });
}

}  // namespace

std::vector<Tensor> pool_features_backward(const Tensor& grad_in, const std::vector<double>& scales,
                                           const Tensor& boxes_in, const MapSizes& sizes, bool channels_last,
                                           bool /*deterministic*/, const RoiAlignParams& params,
                                           const char* op) {
  const Tensor grad = dense_grad(grad_in), boxes = torch::stable::contiguous(boxes_in);
  std::vector<Tensor> grads;
  for (size_t level = 0; level < scales.size(); ++level) {
    grads.push_back(empty_nchw({sizes.batch, grad.size(1), sizes.heights[level], sizes.widths[level]}, grad,
                               channels_last));
  }
  dispatch_floating(grad.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    const Pyramid<T> pyramid = make_grad_pyramid<T>(grads, scales);
    const BoxFolds<A> folds(boxes.const_data_ptr<A>(), boxes.size(0), pyramid, params);
    add_boxes<T>(grad.const_data_ptr<T>(), is_channels_last(grad), pyramid, channels_last, folds, params);
  });
  return grads;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

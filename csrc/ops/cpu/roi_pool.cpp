// A cell's grid of samples is a product of its rows and columns, and so are the bilinear weights. So each
// axis is folded first: the samples that touch one row (or column) of pixels add up to one weight for it, and
// a cell becomes a weighted sum over its few pixels, each read once instead of once per sample.
#include "ops/cpu/roi_pool.h"

#include <algorithm>

namespace panfpn {
namespace {

// For each cell along one axis: the pixels that contribute and the sum of their samples' weights.
template <typename A>
class AxisWeights {
 public:
  struct Entry {
    int64_t pixel;
    A weight;
  };

  void fold(const RoiAxis<A>& axis, int64_t cells, int64_t size) {
    entries_.clear();
    starts_.assign(1, 0);
    for (int64_t cell = 0; cell < cells; ++cell) {
      if (axis.grid > 0) {
        const SampleRange range = samples_on_map(axis, cell, size);
        for (int64_t i = range.begin; i < range.end; ++i) {
          const Taps<A> taps = bilinear_taps(axis.sample(cell, i), size);
          if (!taps.valid) continue;
          add(taps.low, taps.low_weight);
          if (taps.high_weight != A(0)) add(taps.high, taps.high_weight);
        }
      }
      starts_.push_back(entries_.size());
    }
  }

  const Entry* begin(int64_t cell) const { return entries_.data() + starts_[cell]; }
  const Entry* end(int64_t cell) const { return entries_.data() + starts_[cell + 1]; }

 private:
  // Samples come in order, so a pixel seen before is one of the last two entries of this cell.
  void add(int64_t pixel, A weight) {
    const size_t first = starts_.back();
    for (size_t i = entries_.size(); i > first && i + 2 > entries_.size(); --i) {
      if (entries_[i - 1].pixel == pixel) {
        entries_[i - 1].weight += weight;
        return;
      }
    }
    entries_.push_back({pixel, weight});
  }

  std::vector<Entry> entries_;
  std::vector<size_t> starts_;
};

// Pools one box into `out`, channels-last: [pooled_height, pooled_width, C].
template <typename T, typename A>
void pool_box_channels_last(const T* map, int64_t width, int64_t channels, const RoiAlignParams& params,
                            const AxisWeights<A>& rows, const AxisWeights<A>& columns, A scale,
                            std::vector<A>& sum, T* out) {
  for (int64_t ph = 0; ph < params.pooled_height; ++ph) {
    for (int64_t pw = 0; pw < params.pooled_width; ++pw) {
      std::fill(sum.begin(), sum.end(), A(0));
      for (auto row = rows.begin(ph); row != rows.end(ph); ++row) {
        for (auto column = columns.begin(pw); column != columns.end(pw); ++column) {
          const A weight = row->weight * column->weight;
          const T* pixel = map + (row->pixel * width + column->pixel) * channels;
          for (int64_t c = 0; c < channels; ++c) sum[c] += weight * static_cast<A>(pixel[c]);
        }
      }
      for (int64_t c = 0; c < channels; ++c) *out++ = static_cast<T>(sum[c] * scale);
    }
  }
}

// Pools one box into `out`, NCHW: [C, pooled_height, pooled_width].
template <typename T, typename A>
void pool_box_nchw(const T* map, int64_t height, int64_t width, int64_t channels,
                   const RoiAlignParams& params, const AxisWeights<A>& rows, const AxisWeights<A>& columns,
                   A scale, T* out) {
  for (int64_t c = 0; c < channels; ++c, map += height * width) {
    for (int64_t ph = 0; ph < params.pooled_height; ++ph) {
      for (int64_t pw = 0; pw < params.pooled_width; ++pw) {
        A sum = 0;
        for (auto row = rows.begin(ph); row != rows.end(ph); ++row) {
          const T* line = map + row->pixel * width;
          A line_sum = 0;
          for (auto column = columns.begin(pw); column != columns.end(pw); ++column) {
            line_sum += column->weight * static_cast<A>(line[column->pixel]);
          }
          sum += row->weight * line_sum;
        }
        *out++ = static_cast<T>(sum * scale);
      }
    }
  }
}

template <typename T>
void pool_boxes(const Pyramid<T>& pyramid, const accumulate_t<T>* boxes, int64_t count,
                const RoiAlignParams& params, bool channels_last, T* out) {
  using A = accumulate_t<T>;
  const int64_t out_size = pyramid.channels * params.pooled_height * params.pooled_width;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    AxisWeights<A> rows, columns;
    std::vector<A> sum(channels_last ? pyramid.channels : 0);
    for (int64_t k = begin; k < end; ++k) {
      const A* box = boxes + k * 5;
      T* box_out = out + k * out_size;
      const int level = level_of_box(params.rule, pyramid.levels, box[1], box[2], box[3], box[4]);
      const int64_t height = pyramid.height[level], width = pyramid.width[level];
      const bool in_batch = box[0] >= A(0) && box[0] < static_cast<A>(pyramid.batch);  // false for NaN
      if (!in_batch || height == 0 || width == 0) {
        std::fill(box_out, box_out + out_size, T(0));
        continue;
      }
      const A map_scale = static_cast<A>(pyramid.scale[level]);
      const RoiAxis<A> y = make_roi_axis(box[2], box[4], map_scale, params.pooled_height,
                                         params.sampling_ratio, params.aligned);
      const RoiAxis<A> x = make_roi_axis(box[1], box[3], map_scale, params.pooled_width,
                                         params.sampling_ratio, params.aligned);
      rows.fold(y, params.pooled_height, height);
      columns.fold(x, params.pooled_width, width);
      const A samples = static_cast<A>(y.grid) * static_cast<A>(x.grid);
      const A scale = A(1) / std::max(samples, A(1));
      const T* map = pyramid.data[level] + static_cast<int64_t>(box[0]) * pyramid.channels * height * width;
      if (channels_last) {
        pool_box_channels_last(map, width, pyramid.channels, params, rows, columns, scale, sum, box_out);
      } else {
        pool_box_nchw(map, height, width, pyramid.channels, params, rows, columns, scale, box_out);
      }
    }
  });
}

}  // namespace

Tensor pool_features(const std::vector<Tensor>& features, const std::vector<double>& scales,
                     const Tensor& boxes_in, const RoiAlignParams& params, const char* op) {
  const DenseFeatures dense = dense_features(features);
  const Tensor boxes = torch::stable::contiguous(boxes_in);
  Tensor out = empty_nchw({boxes.size(0), features[0].size(1), params.pooled_height, params.pooled_width},
                          features[0], dense.channels_last);
  dispatch_floating(features[0].scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    pool_boxes<T>(make_pyramid<T>(dense.maps, scales), boxes.const_data_ptr<accumulate_t<T>>(), boxes.size(0),
                  params, dense.channels_last, out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace panfpn

// ROIAlign: the geometry of boxes, bins and samples that both devices share.
//
// A box is divided into pooled_height x pooled_width bins; a bin is the mean of grid_h x grid_w bilinear
// samples that are evenly spaced in it. The semantics, including edge cases, are those of
// torchvision.ops.roi_align.
#pragma once

#include <cmath>
#include <cstdint>

#include "ops/host_device.h"
#include "ops/range.h"
#include "stable_compat.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// One axis of one box: the position of its bins in pixels of the feature map, and the number of samples in
// each.
template <typename A>
struct RoiAxis {
  A start;       // of the first bin
  A bin;         // extent of a bin
  int64_t grid;  // samples per bin; 0 if no sample can contribute

  PANFPN_HOST_DEVICE A sample(int64_t bin_index, int64_t i) const {
    return start + static_cast<A>(bin_index) * bin +
           (static_cast<A>(i) + A(0.5)) * bin / static_cast<A>(grid);
  }
};

// Grids with more samples along one axis are treated as empty: at most a few thousand of the samples can fall
// on a feature map, so their share in the mean is below the resolution of half precision.
constexpr int64_t kMaxGrid = int64_t{1} << 31;

template <typename A>
PANFPN_HOST_DEVICE RoiAxis<A> make_roi_axis(A low, A high, A scale, int64_t pooled, int64_t sampling_ratio,
                                            bool aligned) {
  const A offset = aligned ? A(0.5) : A(0);
  const A start = low * scale - offset;
  A extent = high * scale - offset - start;
  const bool finite = std::isfinite(start) && std::isfinite(extent);  // before an extent of -inf becomes 1
  if (!aligned && extent < A(1)) extent = A(1);
  RoiAxis<A> axis{start, extent / static_cast<A>(pooled), sampling_ratio};
  if (sampling_ratio <= 0) {
    const A grid = std::ceil(extent / static_cast<A>(pooled));
    axis.grid = grid > A(0) && grid < static_cast<A>(kMaxGrid) ? static_cast<int64_t>(grid) : 0;
  }
  if (!finite) axis.grid = 0;
  return axis;
}

// The samples of a bin that may be between two coordinates, with up to two more at each end. This limits the
// loop for boxes that are much larger than the map.
template <typename A>
PANFPN_HOST_DEVICE Range samples_between(const RoiAxis<A>& axis, int64_t bin_index, double low, double high) {
  const double step = static_cast<double>(axis.bin) / static_cast<double>(axis.grid);
  if (!(step > 0)) return {0, axis.grid};
  const double base = static_cast<double>(axis.start) + static_cast<double>(bin_index) * axis.bin;
  const double grid = static_cast<double>(axis.grid);
  double begin = std::floor((low - base) / step) - 2.0, end = std::ceil((high - base) / step) + 2.0;
  begin = begin < 0 ? 0 : (begin > grid ? grid : begin);
  end = end < begin ? begin : (end > grid ? grid : end);
  return {static_cast<int64_t>(begin), static_cast<int64_t>(end)};
}

template <typename A>
PANFPN_HOST_DEVICE Range samples_on_map(const RoiAxis<A>& axis, int64_t bin_index, int64_t size) {
  return samples_between(axis, bin_index, -1.0, static_cast<double>(size));
}

// The two pixels that a sample at `x` interpolates between, and their weights.
template <typename A>
struct Taps {
  int64_t low, high;
  A low_weight, high_weight;
  bool valid;
};

template <typename A>
PANFPN_HOST_DEVICE Taps<A> bilinear_taps(A x, int64_t size) {
  if (!(x >= A(-1) && x <= static_cast<A>(size))) return {0, 0, A(0), A(0), false};  // NaN too
  if (x <= A(0)) x = A(0);
  const int64_t low = static_cast<int64_t>(x);
  if (low >= size - 1) return {size - 1, size - 1, A(1), A(0), true};
  const A fraction = x - static_cast<A>(low);
  return {low, low + 1, A(1) - fraction, fraction, true};
}

constexpr int kMaxLevels = 8;

// The maps of a pyramid, finest first.
struct PyramidShape {
  int64_t height[kMaxLevels], width[kMaxLevels];
  double scale[kMaxLevels];
  int levels;
  int64_t batch, channels;
};

// Feature maps (const T) or their gradients, as kernels on both devices take them.
template <typename T>
struct Pyramid : PyramidShape {
  T* data[kMaxLevels];
};

// How the size of a box selects its level: Lin et al. 2017 (Feature Pyramid Networks), equation 1, with
// detectron2's epsilon.
struct LevelRule {
  float canonical_box_size, canonical_level, epsilon;
  int64_t min_level;  // of the finest map: -log2 of its scale
};

inline LevelRule make_level_rule(double canonical_box_size, int64_t canonical_level, double epsilon,
                                 double finest_scale) {
  return {static_cast<float>(canonical_box_size), static_cast<float>(canonical_level),
          static_cast<float>(epsilon), -std::lround(std::log2(finest_scale))};
}

template <typename A>
PANFPN_HOST_DEVICE int level_of_box(const LevelRule& rule, int levels, A x1, A y1, A x2, A y2) {
  if (levels == 1) return 0;
  const float side = std::sqrt(static_cast<float>((x2 - x1) * (y2 - y1)));
  const float level =
      std::floor(rule.canonical_level + std::log2(side / rule.canonical_box_size + rule.epsilon)) -
      static_cast<float>(rule.min_level);
  if (!(level > 0.0f)) return 0;  // NaN too
  return level < static_cast<float>(levels - 1) ? static_cast<int>(level) : levels - 1;
}

inline void check_roi_boxes(const Tensor& boxes, const Tensor& input, const char* op) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, op, ": boxes must be [K, 5]");
  STD_TORCH_CHECK(boxes.device() == input.device(), op, ": boxes and feature maps must be on one device");
  const ScalarType expected =
      input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(boxes.scalar_type() == expected, op,
                  ": boxes must be float32 (float64 for float64 feature maps)");
}

inline void check_multiscale_roi_align_inputs(const std::vector<Tensor>& features, const Tensor& boxes,
                                              const std::vector<double>& scales, int64_t pooled_height,
                                              int64_t pooled_width) {
  const char* op = "multiscale_roi_align";
  STD_TORCH_CHECK(!features.empty() && features.size() <= kMaxLevels, op, ": takes 1 to ", kMaxLevels,
                  " feature maps, got ", features.size());
  STD_TORCH_CHECK(scales.size() == features.size(), op, ": takes one spatial scale for each of the ",
                  features.size(), " feature maps, got ", scales.size());
  STD_TORCH_CHECK(pooled_height > 0 && pooled_width > 0, op, ": the output size must be positive");
  for (const Tensor& feature : features) {
    STD_TORCH_CHECK(feature.dim() == 4, op, ": feature maps must be [N, C, H, W]");
    STD_TORCH_CHECK(feature.size(0) == features[0].size(0) && feature.size(1) == features[0].size(1), op,
                    ": feature maps must have the same N and C");
    STD_TORCH_CHECK(
        feature.scalar_type() == features[0].scalar_type() && feature.device() == features[0].device(), op,
        ": feature maps must have the same dtype and device");
  }
  check_roi_boxes(boxes, features[0], op);
}

inline void check_roi_align_inputs(const Tensor& input, const Tensor& boxes, int64_t pooled_height,
                                   int64_t pooled_width) {
  STD_TORCH_CHECK(input.dim() == 4, "roi_align: input must be [N, C, H, W]");
  STD_TORCH_CHECK(pooled_height > 0 && pooled_width > 0, "roi_align: the output size must be positive");
  check_roi_boxes(boxes, input, "roi_align");
}

// The sizes of the feature maps, which the backward ops take in addition to the arguments of forward.
struct MapSizes {
  int64_t batch;
  std::vector<int64_t> heights, widths;
};

inline void check_roi_backward_inputs(const Tensor& grad, const Tensor& boxes, const MapSizes& sizes,
                                      size_t levels, const char* op) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == boxes.size(0), op, ": grad must be [K, C, H, W]");
  STD_TORCH_CHECK(grad.size(2) > 0 && grad.size(3) > 0, op, ": grad must have at least one bin");
  STD_TORCH_CHECK(levels >= 1 && levels <= kMaxLevels, op, ": takes 1 to ", kMaxLevels, " feature maps, got ",
                  levels);
  STD_TORCH_CHECK(sizes.heights.size() == levels && sizes.widths.size() == levels, op,
                  ": takes one height and one width for each feature map");
  STD_TORCH_CHECK(sizes.batch >= 0, op, ": batch, heights and widths must be at least 0");
  for (size_t level = 0; level < levels; ++level) {
    STD_TORCH_CHECK(sizes.heights[level] >= 0 && sizes.widths[level] >= 0, op,
                    ": batch, heights and widths must be at least 0");
  }
  check_roi_boxes(boxes, grad, op);
}

// Describes `features`, which must stay alive, be dense, and share one memory layout.
template <typename T>
Pyramid<const T> make_pyramid(const std::vector<Tensor>& features, const std::vector<double>& scales) {
  Pyramid<const T> pyramid{};
  pyramid.levels = static_cast<int>(features.size());
  pyramid.batch = features[0].size(0);
  pyramid.channels = features[0].size(1);
  for (int level = 0; level < pyramid.levels; ++level) {
    pyramid.data[level] = features[level].const_data_ptr<T>();
    pyramid.height[level] = features[level].size(2);
    pyramid.width[level] = features[level].size(3);
    pyramid.scale[level] = scales[level];
  }
  return pyramid;
}

// The same for gradients, which the kernel writes.
template <typename T>
Pyramid<T> make_grad_pyramid(const std::vector<Tensor>& grads, const std::vector<double>& scales) {
  const Pyramid<const T> read = make_pyramid<T>(grads, scales);
  Pyramid<T> pyramid{};
  static_cast<PyramidShape&>(pyramid) = read;
  for (int level = 0; level < pyramid.levels; ++level) {
    pyramid.data[level] = grads[level].mutable_data_ptr<T>();
  }
  return pyramid;
}

// Feature maps in a layout that a kernel can read: channels-last if all of them are, otherwise NCHW.
struct DenseFeatures {
  std::vector<Tensor> maps;
  bool channels_last = true;
};

inline DenseFeatures dense_features(const std::vector<Tensor>& features) {
  DenseFeatures dense;
  for (const Tensor& feature : features) dense.channels_last &= is_channels_last(feature);
  for (const Tensor& feature : features) {
    dense.maps.push_back(dense.channels_last ? feature : torch::stable::contiguous(feature));
  }
  return dense;
}

// Returns the tensor in a layout that a kernel can read.
inline Tensor dense_grad(const Tensor& grad) {
  return is_channels_last(grad) ? grad : torch::stable::contiguous(grad);
}

struct RoiAlignParams {
  int64_t pooled_height, pooled_width, sampling_ratio;
  bool aligned;
  LevelRule rule;
};

}  // namespace panfpn::inline PANFPN_ARITHMETIC

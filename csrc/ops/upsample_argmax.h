// Two bilinear resamplings composed into one: upsampling by an integer factor, then resizing the part up to
// `crop` to `size`. Along each axis, an output pixel reads two adjacent pixels of the upsampled image, which
// read at most three adjacent pixels of the input.
#pragma once

#include <algorithm>

#include "ops/upsample.h"
#include "stable_compat.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// output = sum over i < taps of weight[i] * input[base + i], along one axis. Inputs without weight are not
// read, so that a logit of -inf does not become NaN.
template <typename A>
struct ComposedTap {
  int64_t base;
  int taps;  // 1 to 3
  A weight[3];
};

// The coordinates of the second resampling have the precision and the order of operations of F.interpolate,
// so that both agree on the largest class. As there, a resampling to the same size does nothing.
template <typename A>
PANFPN_HOST_DEVICE ComposedTap<A> composed_tap(int64_t output, int64_t size, int64_t crop, int64_t factor,
                                               int64_t input_size) {
  int64_t low = output;
  A high_weight = A(0);
  if (size != crop) {
    const A scale = static_cast<A>(crop) / static_cast<A>(size);
    const A position = scale * (static_cast<A>(output) + A(0.5));
    const A source = position > A(0.5) ? position - A(0.5) : A(0);
    low = std::min(static_cast<int64_t>(source), crop - 1);
    high_weight = std::clamp(source - static_cast<A>(low), A(0), A(1));
  }
  const int64_t high = low + 1 < crop ? low + 1 : low;
  const UpsampleTap<A> upsampled[2] = {upsample_tap<A>(low, factor, input_size),
                                       upsample_tap<A>(high, factor, input_size)};
  double weight[4] = {0, 0, 0, 0};
  for (int i = 0; i < 2; ++i) {
    const double share = i == 0 ? 1.0 - high_weight : high_weight, upper = upsampled[i].high_weight;
    weight[upsampled[i].low - upsampled[0].low] += share * (1.0 - upper);
    weight[upsampled[i].high - upsampled[0].low] += share * upper;
  }
  const int first = weight[0] == 0;  // only if all of the weight is on the higher pixel
  ComposedTap<A> tap{upsampled[0].low + first, 1, {A(0), A(0), A(0)}};
  for (int i = 0; i < 3; ++i) {
    tap.weight[i] = static_cast<A>(weight[first + i]);
    if (tap.weight[i] != A(0)) tap.taps = i + 1;
  }
  return tap;
}

constexpr int64_t kMaxClasses = 32767;            // labels are int16
constexpr int64_t kMaxFactor = int64_t{1} << 24;  // larger factors might overflow sizes

inline void check_upsample_argmax_inputs(const Tensor& logits, int64_t scale_factor, int64_t crop_height,
                                         int64_t crop_width, int64_t height, int64_t width) {
  STD_TORCH_CHECK(logits.dim() == 4, "upsample_argmax: logits must be [N, C, H, W]");
  STD_TORCH_CHECK(logits.size(1) >= 1 && logits.size(1) <= kMaxClasses,
                  "upsample_argmax: logits must have 1 to ", kMaxClasses, " classes, got ", logits.size(1));
  STD_TORCH_CHECK(scale_factor >= 1 && scale_factor <= kMaxFactor,
                  "upsample_argmax: scale_factor must be 1 to ", kMaxFactor, ", got ", scale_factor);
  STD_TORCH_CHECK(
      crop_height >= 0 && crop_height <= logits.size(2) * scale_factor && crop_width >= 0 &&
          crop_width <= logits.size(3) * scale_factor,
      "upsample_argmax: crop_height and crop_width must be between 0 and scale_factor times the height and "
      "width of logits, got ",
      crop_height, " and ", crop_width);
  STD_TORCH_CHECK(height >= 0 && width >= 0, "upsample_argmax: height and width must be at least 0, got ",
                  height, " and ", width);
  STD_TORCH_CHECK((height == 0 || crop_height > 0) && (width == 0 || crop_width > 0),
                  "upsample_argmax: an empty crop can only be resized to an empty image");
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

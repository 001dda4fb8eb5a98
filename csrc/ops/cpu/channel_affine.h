// GroupNorm with given statistics: one multiplication and one addition for each image and channel.
#pragma once

#include <vector>

#include "ops/cpu/lanes.h"
#include "ops/group_norm.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// Reads the values of a tensor of any floating dtype.
template <typename A>
std::vector<A> read_values(const Tensor& tensor, const char* op) {
  const Tensor dense = torch::stable::contiguous(tensor);
  std::vector<A> values(static_cast<size_t>(dense.numel()));
  dispatch_floating(dense.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* data = dense.const_data_ptr<T>();
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<A>(data[i]);
  });
  return values;
}

// The normalised value of x is scale * x + shift. Both are [N, padded channels], zero in the padding.
template <typename A>
struct ChannelAffine {
  int64_t padded;
  std::vector<A> scale, shift;

  ChannelAffine(const Tensor& mean, const Tensor& rstd, const Tensor& weight, const Tensor& bias,
                const char* op)
      : padded(padded_channels<A>(weight.numel())),
        scale(mean.size(0) * padded),
        shift(mean.size(0) * padded) {
    const auto means = read_values<A>(mean, op), rstds = read_values<A>(rstd, op),
               weights = read_values<A>(weight, op), biases = read_values<A>(bias, op);
    const int64_t groups = mean.size(1), channels = weight.numel();
    for (int64_t n = 0; n < mean.size(0); ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t group = n * groups + c / (channels / groups), at = n * padded + c;
        scale[at] = rstds[group] * weights[c];
        shift[at] = biases[c] - means[group] * scale[at];
      }
    }
  }
};

// max(scale * x + shift, 0); NaN stays NaN.
template <typename A>
PANFPN_ALWAYS_INLINE void normalise_relu(const Lanes<A>& x, const Lanes<A>& scale, const Lanes<A>& shift,
                                         Lanes<A>& to) {
  const Lanes<A> value = x * scale + shift;
  to = value <= A(0) ? Lanes<A>{} : value;
}

// Activations of `count` channels-last pixels -> [count, padded channels].
template <typename T, typename A>
PANFPN_VECTOR_CLONES void activate_pixels(const T* pixels, int64_t count, int64_t channels, const A* scale,
                                          const A* shift, A* to) {
  constexpr int L = kLanes<A>;
  const int64_t padded = padded_channels<A>(channels);
  for (int64_t i = 0; i < count; ++i, pixels += channels, to += padded) {
    Lanes<A> lanes, scales, shifts;
    int64_t c = 0;
    for (; c + L <= channels; c += L) {
      load_lanes(pixels + c, lanes);
      load_lanes(scale + c, scales);
      load_lanes(shift + c, shifts);
      normalise_relu<A>(lanes, scales, shifts, lanes);
      store_lanes(lanes, to + c);
    }
    if (c < channels) {
      load_some<T, A>(pixels + c, channels - c, lanes);
      load_lanes(scale + c, scales);
      load_lanes(shift + c, shifts);
      normalise_relu<A>(lanes, scales, shifts, lanes);
      store_lanes(lanes, to + c);
    }
  }
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

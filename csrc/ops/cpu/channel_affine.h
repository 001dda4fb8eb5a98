// GroupNorm with given statistics as one multiplication and one addition per channel.
#pragma once

#include <vector>

#include "ops/cpu/lanes.h"
#include "ops/group_norm.h"

namespace panfpn {

// Channels are padded to whole registers, so that every load of a channel's constants is a full one.
template <typename A>
constexpr int64_t padded_channels(int64_t channels) {
  return (channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// The values of a tensor of any floating dtype.
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

// scale * x + shift is the normalised x, [N, padded channels] each; zero in the padding.
template <typename A>
struct ChannelAffine {
  std::vector<A> scale, shift;
  int64_t padded;

  ChannelAffine(const Tensor& mean, const Tensor& rstd, const Tensor& weight, const Tensor& bias,
                const char* op)
      : padded(padded_channels<A>(weight.numel())) {
    const auto means = read_values<A>(mean, op), rstds = read_values<A>(rstd, op),
               weights = read_values<A>(weight, op), biases = read_values<A>(bias, op);
    const int64_t batch = mean.size(0), groups = mean.size(1), channels = weight.numel();
    scale.resize(batch * padded);
    shift.resize(batch * padded);
    for (int64_t n = 0; n < batch; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t group = n * groups + c / (channels / groups), at = n * padded + c;
        scale[at] = rstds[group] * weights[c];
        shift[at] = biases[c] - means[group] * scale[at];
      }
    }
  }
};

// max(scale * x + shift, 0), where NaN stays NaN.
template <typename A>
PANFPN_ALWAYS_INLINE void normalise_relu(const Lanes<A>& x, const Lanes<A>& scale, const Lanes<A>& shift,
                                         Lanes<A>& to) {
  const Lanes<A> value = x * scale + shift;
  to = value <= A(0) ? Lanes<A>{} : value;
}

// The first `count` lanes, which may be all.
template <typename T, typename A>
PANFPN_ALWAYS_INLINE void load_up_to(const T* from, int64_t count, Lanes<A>& to) {
  if (count >= kLanes<A>) {
    load_lanes(from, to);
  } else {
    load_some<T, A>(from, count, to);
  }
}
template <typename T, typename A>
PANFPN_ALWAYS_INLINE void store_up_to(const Lanes<A>& from, int64_t count, T* to) {
  if (count >= kLanes<A>) {
    store_lanes(from, to);
  } else {
    store_some<T, A>(from, count, to);
  }
}

}  // namespace panfpn

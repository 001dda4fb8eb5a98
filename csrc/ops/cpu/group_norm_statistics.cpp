// Blocks of fixed size are summed in parallel and combined in order (Chan, Golub and LeVeque 1979), so the
// result does not depend on the number of threads. Within a block, values are taken relative to the mean of
// its first `1 / kPilot` part. If k of the block's n values are in this part, the sum of squares exceeds the
// sum of squared deviations from the true mean by a factor of at most 1 + n / k, so nothing cancels.
#include <algorithm>
#include <cmath>

#include "ops/cpu/lanes.h"
#include "ops/group_norm.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

constexpr int64_t kPilot = 8;

// The number of values, their mean, and the sum of squared deviations from it.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  // The moments of values whose differences from `centre` have this sum and this sum of squares.
  static Moments of_shifted(double count, double centre, double sum, double squares) {
    return {count, centre + sum / count, squares - sum * sum / count};
  }

  void add(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2 + delta * delta * (count * other.count / total);
    count = total;
  }
};

template <typename T, typename A>
PANFPN_ALWAYS_INLINE void load_up_to(const T* from, int64_t count, Lanes<A>& to) {
  if (count >= kLanes<A>) {
    load_lanes(from, to);
  } else {
    load_some<T, A>(from, count, to);
  }
}

template <typename A>
PANFPN_ALWAYS_INLINE double sum_of_lanes(const Lanes<A>& lanes) {
  double sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += static_cast<double>(lanes[i]);
  return sum;
}

// The moments of contiguous values of one group.
template <typename T, typename A>
PANFPN_VECTOR_CLONES Moments moments_of_run(const T* values, int64_t count) {
  constexpr int L = kLanes<A>;
  const int64_t pilot = (count + kPilot - 1) / kPilot;
  Lanes<A> pilot_sum{};
  for (int64_t i = 0; i < pilot; i += L) {
    Lanes<A> lanes;
    load_up_to<T, A>(values + i, pilot - i, lanes);
    pilot_sum += lanes;
  }
  const A centre = static_cast<A>(sum_of_lanes<A>(pilot_sum) / static_cast<double>(pilot));
  const Lanes<A> centres = Lanes<A>{} + centre;
  Lanes<A> sum[4]{}, squares[4]{};
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      Lanes<A> lanes;
      load_lanes(values + i + v * L, lanes);
      lanes -= centres;
      sum[v] += lanes;
      squares[v] += lanes * lanes;
    }
  }
  double total = 0, total_squares = 0;
  for (; i < count; ++i) {
    const double rest = static_cast<double>(static_cast<A>(values[i]) - centre);
    total += rest;
    total_squares += rest * rest;
  }
  for (int v = 0; v < 4; ++v) {
    total += sum_of_lanes<A>(sum[v]);
    total_squares += sum_of_lanes<A>(squares[v]);
  }
  return Moments::of_shifted(static_cast<double>(count), static_cast<double>(centre), total, total_squares);
}

// Sums the channels-last pixels for each channel.
template <typename T, typename A>
PANFPN_ALWAYS_INLINE void sum_channels(const T* pixels, int64_t count, int64_t channels, A* sums) {
  constexpr int L = kLanes<A>;
  for (int64_t c = 0; c < channels; c += L) {
    Lanes<A> sum{};
    for (int64_t i = 0; i < count; ++i) {
      Lanes<A> lanes;
      load_up_to<T, A>(pixels + i * channels + c, channels - c, lanes);
      sum += lanes;
    }
    store_lanes(sum, sums + c);
  }
}

// For V vectors of channels, the last of which has `rest` lanes: the sums of the differences from `centres`,
// and of their squares.
template <typename T, typename A, int V>
PANFPN_ALWAYS_INLINE void sum_shifted(const T* pixels, int64_t count, int64_t channels, int64_t rest,
                                      const A* centres, A* sums, A* squares) {
  constexpr int L = kLanes<A>;
  Lanes<A> centre[V], sum[V], square[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    load_lanes(centres + v * L, centre[v]);
    sum[v] = square[v] = Lanes<A>{};
  }
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Lanes<A> lanes;
      if (V > 1) {
        load_lanes(pixels + i * channels + v * L, lanes);
      } else {
        load_up_to<T, A>(pixels + i * channels, rest, lanes);
      }
      lanes -= centre[v];
      sum[v] += lanes;
      square[v] += lanes * lanes;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    store_lanes(sum[v], sums + v * L);
    store_lanes(square[v], squares + v * L);
  }
}

// The moments of all groups of consecutive channels-last pixels. `scratch` has room for three times the
// padded channels.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void moments_of_pixels(const T* pixels, int64_t count, int64_t channels, int64_t groups,
                                            A* scratch, Moments* moments) {
  constexpr int L = kLanes<A>;
  const int64_t padded = padded_channels<A>(channels), size = channels / groups;
  const int64_t pilot = (count + kPilot - 1) / kPilot;
  A *const centres = scratch, *const sums = scratch + padded, *const squares = scratch + 2 * padded;
  sum_channels<T, A>(pixels, pilot, channels, sums);
  for (int64_t group = 0; group < groups; ++group) {
    double sum = 0;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) sum += static_cast<double>(sums[c]);
    std::fill_n(centres + group * size, size, static_cast<A>(sum / static_cast<double>(pilot * size)));
  }
  int64_t c = 0;
  for (; c + 8 * L <= channels; c += 8 * L) {
    sum_shifted<T, A, 8>(pixels + c, count, channels, L, centres + c, sums + c, squares + c);
  }
  for (; c + 4 * L <= channels; c += 4 * L) {
    sum_shifted<T, A, 4>(pixels + c, count, channels, L, centres + c, sums + c, squares + c);
  }
  for (; c < channels; c += L) {
    sum_shifted<T, A, 1>(pixels + c, count, channels, channels - c, centres + c, sums + c, squares + c);
  }
  for (int64_t group = 0; group < groups; ++group) {
    double sum = 0, square = 0;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) {
      sum += static_cast<double>(sums[c]);
      square += static_cast<double>(squares[c]);
    }
    moments[group] = Moments::of_shifted(static_cast<double>(count * size),
                                         static_cast<double>(centres[group * size]), sum, square);
  }
}

// Moments [N, blocks, G] of channels-last images, divided into blocks of pixels.
template <typename T>
std::vector<Moments> channels_last_moments(const T* data, int64_t batch, int64_t channels, int64_t pixels,
                                           int64_t groups, int64_t block, int64_t blocks) {
  using A = accumulate_t<T>;
  std::vector<Moments> moments(batch * blocks * groups);
  torch::stable::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(3 * padded_channels<A>(channels));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * block;
      moments_of_pixels<T, A>(data + (i / blocks * pixels + first) * channels,
                              std::min(block, pixels - first), channels, groups, scratch.data(),
                              moments.data() + i * groups);
    }
  });
  return moments;
}

// The same for NCHW images, where the values of a group are contiguous.
template <typename T>
std::vector<Moments> planes_moments(const T* data, int64_t batch, int64_t run, int64_t groups, int64_t block,
                                    int64_t blocks) {
  std::vector<Moments> moments(batch * blocks * groups);
  torch::stable::parallel_for(0, batch * groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * block, n = i / blocks / groups, group = i / blocks % groups;
      moments[(n * blocks + i % blocks) * groups + group] =
          moments_of_run<T, accumulate_t<T>>(data + i / blocks * run + first, std::min(block, run - first));
    }
  });
  return moments;
}

std::tuple<Tensor, Tensor> group_norm_statistics(const Tensor& input, int64_t num_groups, double eps) {
  check_group_norm_statistics_inputs(input, num_groups, eps);
  const bool channels_last = is_channels_last(input);
  const Tensor dense = channels_last ? input : torch::stable::contiguous(input);
  const int64_t batch = input.size(0), channels = input.size(1), pixels = input.size(2) * input.size(3);
  const ScalarType dtype = accumulate_dtype(input.scalar_type());
  Tensor mean = empty({batch, num_groups}, dtype, input), rstd = empty({batch, num_groups}, dtype, input);
  constexpr int64_t kBlock = int64_t{1} << 15;
  const int64_t run = channels_last ? pixels : channels / num_groups * pixels;
  const int64_t block =
      channels_last ? std::max<int64_t>(kBlock / std::max<int64_t>(channels, 1), kPilot) : kBlock;
  const int64_t blocks = channels == 0 ? 0 : (run + block - 1) / block;
  dispatch_floating(input.scalar_type(), "group_norm_statistics", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    const T* data = dense.const_data_ptr<T>();
    const std::vector<Moments> moments =
        channels_last ? channels_last_moments<T>(data, batch, channels, pixels, num_groups, block, blocks)
                      : planes_moments<T>(data, batch, run, num_groups, block, blocks);
    A *const means = mean.mutable_data_ptr<A>(), *const rstds = rstd.mutable_data_ptr<A>();
    for (int64_t n = 0; n < batch; ++n) {
      for (int64_t group = 0; group < num_groups; ++group) {
        Moments all;
        for (int64_t b = 0; b < blocks; ++b) all.add(moments[(n * blocks + b) * num_groups + group]);
        means[n * num_groups + group] = static_cast<A>(all.mean);
        rstds[n * num_groups + group] =
            static_cast<A>(1 / std::sqrt(all.m2 / std::max(all.count, 1.0) + eps));
      }
    }
  });
  return {mean, rstd};
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("group_norm_statistics", TORCH_BOX(&group_norm_statistics));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// Two passes. The first gathers the gradient of each normalised value, sets it to zero where the ReLU did,
// stores it, and sums it up for each channel and row, both as it is and times the distance of the value from
// the mean. The sums are added in the order of the rows, whichever thread computed them. The second pass
// subtracts the gradient through the statistics.
#include "ops/cpu/channel_affine.h"
#include "ops/cpu/pages.h"
#include "ops/cpu/upsample_gather.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// The constants that normalise an image's channels, padded to whole vectors.
template <typename A>
struct Constants {
  const A *scale, *shift, *mean;
};

// Sets g to zero where the ReLU set x to zero, and adds it to the sums.
template <typename A>
PANFPN_ALWAYS_INLINE void mask_and_sum(const Lanes<A>& x, const Lanes<A>& scale, const Lanes<A>& shift,
                                       const Lanes<A>& mean, Lanes<A>& g, Lanes<A>& sum,
                                       Lanes<A>& sum_of_products) {
  const Lanes<A> value = x * scale + shift;
  g = value <= A(0) ? Lanes<A>{} : g;
  sum += g;
  sum_of_products += g * (x - mean);
}

// Takes the gradients of V vectors of a channels-last row.
template <typename T, typename A, int V>
struct MaskSink {
  const T* x;
  A *g, *sums, *sums_of_products;
  Constants<A> constants;
  int64_t channels, rest;
  Lanes<A> sum[V], sum_of_products[V];

  PANFPN_ALWAYS_INLINE void put(int64_t pixel, Lanes<A> (&lanes)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = pixel * channels + v * kLanes<A>;
      const bool whole = V > 1 || rest >= kLanes<A>;
      Lanes<A> values, scale, shift, mean;
      if (whole) {
        load_lanes(x + at, values);
      } else {
        load_some<T, A>(x + at, rest, values);
      }
      load_lanes(constants.scale + v * kLanes<A>, scale);
      load_lanes(constants.shift + v * kLanes<A>, shift);
      load_lanes(constants.mean + v * kLanes<A>, mean);
      mask_and_sum<A>(values, scale, shift, mean, lanes[v], sum[v], sum_of_products[v]);
      if (whole) {
        store_lanes(lanes[v], g + at);
      } else {
        store_some<A, A>(lanes[v], rest, g + at);
      }
    }
  }
  PANFPN_ALWAYS_INLINE void finish() {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store_lanes(sum[v], sums + v * kLanes<A>);
      store_lanes(sum_of_products[v], sums_of_products + v * kLanes<A>);
    }
  }
};

template <typename T, typename A>
struct MaskSinks {
  const T* x;
  A *g, *sums, *sums_of_products;
  Constants<A> constants;
  int64_t channels;

  template <int V>
  PANFPN_ALWAYS_INLINE MaskSink<T, A, V> at(int64_t c) const {
    return {x + c,
            g + c,
            sums + c,
            sums_of_products + c,
            {constants.scale + c, constants.shift + c, constants.mean + c},
            channels,
            channels - c,
            {},
            {}};
  }
};

template <typename T, typename A>
PANFPN_VECTOR_CLONES void gather_and_mask(const RowTaps<T, A>& taps, const CellWeights<A>& weights,
                                          int64_t width, int64_t factor, int64_t channels,
                                          const MaskSinks<T, A>& sinks) {
  gather_pixels<T, A>(taps, weights, width, factor, channels, sinks);
}

// Takes a row of a plane, whose gathered gradients are in `low`.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void mask_row(const T* x, const A* low, int64_t width, const Constants<A>& constants,
                                   A* g, A* sum, A* sum_of_products) {
  constexpr int L = kLanes<A>;
  const Lanes<A> scale = Lanes<A>{} + *constants.scale, shift = Lanes<A>{} + *constants.shift,
                 mean = Lanes<A>{} + *constants.mean;
  Lanes<A> sums{}, sums_of_products{};
  for (int64_t i = 0; i < width; i += L) {
    Lanes<A> values, lanes;
    load_lanes(low + i, lanes);
    if (width - i >= L) {
      load_lanes(x + i, values);
      mask_and_sum<A>(values, scale, shift, mean, lanes, sums, sums_of_products);
      store_lanes(lanes, g + i);
    } else {
      load_some<T, A>(x + i, width - i, values);
      Lanes<A> some;
      load_some<A, A>(low + i, width - i, some);  // zeros beyond the row, for the sums
      mask_and_sum<A>(values, scale, shift, mean, some, sums, sums_of_products);
      store_some<A, A>(some, width - i, g + i);
    }
  }
  *sum = *sum_of_products = A(0);
  for (int lane = 0; lane < L; ++lane) {
    *sum += sums[lane];
    *sum_of_products += sums_of_products[lane];
  }
}

// The factors of the second pass, [N, padded channels] each:
// to = scale * g - offset - slope * (x - mean)
template <typename A>
struct Correction {
  std::vector<A> offset, slope;
};

template <typename T, typename A>
PANFPN_VECTOR_CLONES void correct_pixels(const T* x, const A* g, int64_t count, int64_t channels,
                                         const A* scale, const A* mean, const A* offset, const A* slope,
                                         T* to) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t at = i * channels + c, rest = channels - c;
      Lanes<A> values, lanes, scales, means, offsets, slopes;
      load_lanes(scale + c, scales);
      load_lanes(mean + c, means);
      load_lanes(offset + c, offsets);
      load_lanes(slope + c, slopes);
      if (rest >= L) {
        load_lanes(x + at, values);
        load_lanes(g + at, lanes);
        lanes = lanes * scales - offsets - (values - means) * slopes;
        store_lanes(lanes, to + at);
      } else {
        load_some<T, A>(x + at, rest, values);
        load_some<A, A>(g + at, rest, lanes);
        lanes = lanes * scales - offsets - (values - means) * slopes;
        store_some<T, A>(lanes, rest, to + at);
      }
    }
  }
}

template <typename T>
class Backward {
  using A = accumulate_t<T>;
  static constexpr int64_t L = kLanes<A>;

 public:
  Backward(const Tensor& mean, const Tensor& rstd, const Tensor& weight, const Tensor& bias,
           const MapSize& size, bool channels_last, const char* op)
      : size_(size),
        channels_last_(channels_last),
        groups_(mean.size(1)),
        affine_(mean, rstd, weight, bias, op),
        rstd_(read_values<A>(rstd, op)),
        weight_(read_values<A>(weight, op)),
        mean_(affine_.scale.size()),
        sums_(2 * size.batch * size.height * affine_.padded) {
    const auto means = read_values<A>(mean, op);
    for (int64_t n = 0; n < size.batch; ++n) {
      for (int64_t c = 0; c < size.channels; ++c) mean_[n * affine_.padded + c] = means[group(n, c)];
    }
  }

  // The first pass; g is [N, C, H, W] in the layout of x.
  void gather(const T* grad, const T* x, A* g) {
    const CellWeights<A> weights(size_.factor);
    const int64_t units = channels_last_ ? size_.batch : size_.batch * size_.channels;
    const int64_t row_size = size_.width * (channels_last_ ? size_.channels : 1);
    const int64_t large_row = row_size * size_.factor, large = size_.height * size_.factor * large_row;
    torch::stable::parallel_for(
        0, units * size_.height, grain_of(size_.factor * large_row), [&](int64_t begin, int64_t end) {
          std::vector<A> line(gather_scratch<A>(size_.large_width())), low(gather_scratch<A>(size_.width));
          RowTaps<T, A> taps;
          for (int64_t i = begin; i < end; ++i) {
            const int64_t unit = i / size_.height, y = i % size_.height, at = i * row_size;
            taps.move_to(grad + unit * large, large_row, y, size_.height, size_.factor, weights);
            if (channels_last_) {
              gather_and_mask<T, A>(taps, weights, size_.width, size_.factor, size_.channels,
                                    {x + at, g + at, sum(unit, y), sum_of_products(unit, y),
                                     constants(unit, 0), size_.channels});
            } else {
              const int64_t n = unit / size_.channels, c = unit % size_.channels;
              gather_plane_row<T, A>(taps, weights, size_.width, size_.factor, line.data(), low.data());
              mask_row<T, A>(x + at, low.data(), size_.width, constants(n, c), g + at, sum(n, y) + c,
                             sum_of_products(n, y) + c);
            }
          }
        });
  }

  // Computes the gradients of weight and bias, and the factors of the second pass.
  Correction<A> reduce(std::vector<double>& weight_grad, std::vector<double>& bias_grad) {
    Correction<A> correction{std::vector<A>(mean_.size()), std::vector<A>(mean_.size())};
    const int64_t group_size = size_.channels / groups_;
    const double count = static_cast<double>(group_size * size_.plane());
    for (int64_t n = 0; n < size_.batch; ++n) {
      std::vector<double> total(size_.channels), products(size_.channels);
      for (int64_t y = 0; y < size_.height; ++y) {
        for (int64_t c = 0; c < size_.channels; ++c) {
          total[c] += static_cast<double>(sum(n, y)[c]);
          products[c] += static_cast<double>(sum_of_products(n, y)[c]);
        }
      }
      for (int64_t first = 0; first < size_.channels; first += group_size) {
        const double rstd = static_cast<double>(rstd_[group(n, first)]);
        double offset = 0, slope = 0;
        for (int64_t c = first; c < first + group_size; ++c) {
          bias_grad[c] += total[c];
          weight_grad[c] += products[c] * rstd;
          offset += total[c] * static_cast<double>(weight_[c]);
          slope += products[c] * static_cast<double>(weight_[c]);
        }
        A* const at = correction.offset.data() + n * affine_.padded + first;
        std::fill(at, at + group_size, static_cast<A>(rstd * offset / count));
        A* const slope_at = correction.slope.data() + n * affine_.padded + first;
        std::fill(slope_at, slope_at + group_size, static_cast<A>(rstd * rstd * rstd * slope / count));
      }
    }
    return correction;
  }

  // The second pass; `to` may be `g`.
  void correct(const T* x, const A* g, const Correction<A>& correction, T* to) {
    const int64_t units = channels_last_ ? size_.batch * size_.height : size_.batch * size_.channels;
    const int64_t unit_size = channels_last_ ? size_.width * size_.channels : size_.plane();
    torch::stable::parallel_for(0, units, grain_of(unit_size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * unit_size;
        if (channels_last_) {
          const int64_t first = i / size_.height * affine_.padded;
          correct_pixels<T, A>(x + at, g + at, size_.width, size_.channels, affine_.scale.data() + first,
                               mean_.data() + first, correction.offset.data() + first,
                               correction.slope.data() + first, to + at);
        } else {
          // Pixels with as many "channels" as a vector has lanes, all with the same constants.
          const int64_t channel = i / size_.channels * affine_.padded + i % size_.channels;
          A scale[L], mean[L], offset[L], slope[L];
          std::fill(scale, scale + L, affine_.scale[channel]);
          std::fill(mean, mean + L, mean_[channel]);
          std::fill(offset, offset + L, correction.offset[channel]);
          std::fill(slope, slope + L, correction.slope[channel]);
          const int64_t whole = unit_size / L, rest = unit_size % L, last = at + whole * L;
          correct_pixels<T, A>(x + at, g + at, whole, L, scale, mean, offset, slope, to + at);
          if (rest > 0)
            correct_pixels<T, A>(x + last, g + last, 1, rest, scale, mean, offset, slope, to + last);
        }
      }
    });
  }

 private:
  int64_t group(int64_t n, int64_t c) const { return n * groups_ + c / (size_.channels / groups_); }
  A* sum(int64_t n, int64_t y) { return sums_.data() + 2 * (n * size_.height + y) * affine_.padded; }
  A* sum_of_products(int64_t n, int64_t y) { return sum(n, y) + affine_.padded; }
  Constants<A> constants(int64_t n, int64_t c) const {
    const int64_t at = n * affine_.padded + c;
    return {affine_.scale.data() + at, affine_.shift.data() + at, mean_.data() + at};
  }

  MapSize size_;
  bool channels_last_;
  int64_t groups_;
  ChannelAffine<A> affine_;
  std::vector<A> rstd_, weight_, mean_, sums_;  // mean [N, padded], sums [N, H, 2, padded]
};

Tensor write_values(const std::vector<double>& values, const Tensor& like, const char* op) {
  Tensor out = empty({static_cast<int64_t>(values.size())}, like.scalar_type(), like);
  dispatch_floating(like.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* data = out.mutable_data_ptr<T>();
    for (size_t i = 0; i < values.size(); ++i)
      data[i] = static_cast<T>(static_cast<accumulate_t<T>>(values[i]));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_relu_upsample_backward(const Tensor& grad, const Tensor& input,
                                                                     const Tensor& mean, const Tensor& rstd,
                                                                     const Tensor& weight, const Tensor& bias,
                                                                     int64_t scale_factor) {
  const char* op = "group_norm_relu_upsample_backward";
  check_group_norm_inputs(input, mean, rstd, weight, bias, op);
  check_upsampled(grad, input, scale_factor, "grad", op);
  const bool channels_last = is_channels_last(input);
  const auto layout = channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                    : torch::headeronly::MemoryFormat::Contiguous;
  const MapSize size{input.size(0), input.size(1), input.size(2), input.size(3), scale_factor};
  Tensor input_grad = empty_nchw({size.batch, size.channels, size.height, size.width}, input, channels_last);
  std::vector<double> weight_grad(size.channels), bias_grad(size.channels);
  if (input_grad.numel() > 0) {
    const Tensor dense_grad = torch::stable::contiguous(grad, layout);
    const Tensor dense = torch::stable::contiguous(input, layout);
    dispatch_floating(input.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using A = accumulate_t<T>;
      T* const out = input_grad.mutable_data_ptr<T>();
      // Half precision is rounded once, at the end, so the intermediate gradients need memory of their own.
      Tensor wide = input_grad;
      if constexpr (!std::is_same_v<T, A>) wide = empty({input.numel()}, ScalarType::Float, input);
      A* const g = wide.mutable_data_ptr<A>();
      advise_huge_pages(g, wide.numel() * static_cast<int64_t>(sizeof(A)));
      advise_huge_pages(out, input.numel() * static_cast<int64_t>(sizeof(T)));
      const T* const x = dense.const_data_ptr<T>();
      Backward<T> backward(mean, rstd, weight, bias, size, channels_last, op);
      backward.gather(dense_grad.const_data_ptr<T>(), x, g);
      backward.correct(x, g, backward.reduce(weight_grad, bias_grad), out);
    });
  }
  return {input_grad, write_values(weight_grad, weight, op), write_values(bias_grad, bias, op)};
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("group_norm_relu_upsample_backward", TORCH_BOX(&group_norm_relu_upsample_backward));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

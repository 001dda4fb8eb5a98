// A low-resolution row is normalised once, into scratch. The outputs between two low rows, and of them those
// between two low columns, form a cell: all read the same four activations.
#include <algorithm>
#include <optional>

#include "ops/cpu/channel_affine.h"

namespace panfpn {
namespace {

struct MapSize {
  int64_t batch, channels, height, width, factor;
};

// Along one axis of `size` inputs, cell i of size + 1 lies between the inputs i - 1 and i (only one of which
// exists at the borders) and holds the outputs `first` + k for k in [begin, end).
struct Cell {
  int64_t low, high, first, begin, end;
};

inline Cell cell_of(int64_t i, int64_t size, int64_t factor) {
  const int64_t first = factor * (i - 1) + factor / 2;
  return {std::max<int64_t>(i - 1, 0), std::min(i, size - 1), first, std::max<int64_t>(-first, 0),
          std::min(factor, size * factor - first)};
}

// Weight of the cell's second input in its output k.
template <typename A>
PANFPN_ALWAYS_INLINE A cell_weight(int64_t k, int64_t factor) {
  return static_cast<A>(2 * k + 1 - factor % 2) / static_cast<A>(2 * factor);
}

// Channels-last row -> [W, padded channels].
template <typename T, typename A>
PANFPN_VECTOR_CLONES void activate_pixels(const T* row, int64_t width, int64_t channels, const A* scale,
                                          const A* shift, A* to) {
  const int64_t padded = padded_channels<A>(channels);
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t c = 0; c < padded; c += kLanes<A>) {
      Lanes<A> lanes, scales, shifts;
      load_up_to<T, A>(row + x * channels + c, channels - c, lanes);
      load_lanes(scale + c, scales);
      load_lanes(shift + c, shifts);
      normalise_relu<A>(lanes, scales, shifts, lanes);
      store_lanes(lanes, to + x * padded + c);
    }
  }
}

// The outputs of a row of cells between the low rows `above` and `below`. `out` and `residual` are the
// image's.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void upsample_pixels(const A* above, const A* below, const Cell& rows,
                                          const MapSize& size, const T* residual, T* out) {
  const int64_t padded = padded_channels<A>(size.channels), factor = size.factor;
  for (int64_t j = 0; j <= size.width; ++j) {
    const Cell columns = cell_of(j, size.width, factor);
    for (int64_t c = 0; c < size.channels; c += kLanes<A>) {
      Lanes<A> above_low, above_high, below_low, below_high;
      load_lanes(above + columns.low * padded + c, above_low);
      load_lanes(above + columns.high * padded + c, above_high);
      load_lanes(below + columns.low * padded + c, below_low);
      load_lanes(below + columns.high * padded + c, below_high);
      for (int64_t k = rows.begin; k < rows.end; ++k) {
        const A y = cell_weight<A>(k, factor);
        const Lanes<A> low = above_low * (1 - y) + below_low * y,
                       high = above_high * (1 - y) + below_high * y;
        const int64_t row = (rows.first + k) * size.width * factor + columns.first;
        for (int64_t m = columns.begin; m < columns.end; ++m) {
          const A x = cell_weight<A>(m, factor);
          Lanes<A> value = low * (1 - x) + high * x;
          const int64_t at = (row + m) * size.channels + c;
          if (residual != nullptr) {
            Lanes<A> add;
            load_up_to<T, A>(residual + at, size.channels - c, add);
            value += add;
          }
          store_up_to<T, A>(value, size.channels - c, out + at);
        }
      }
    }
  }
}

template <typename T>
void channels_last_forward(const T* input, const ChannelAffine<accumulate_t<T>>& affine, const MapSize& size,
                           const T* residual, T* out) {
  using A = accumulate_t<T>;
  const int64_t row_size = size.width * size.channels, scratch_size = size.width * affine.padded;
  const int64_t large = size.height * row_size * size.factor * size.factor;
  torch::stable::parallel_for(0, size.batch * (size.height + 1), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(2 * scratch_size);  // row y is in half y % 2
    int64_t made = -1;                         // counted through the batch
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / (size.height + 1);
      const Cell rows = cell_of(i % (size.height + 1), size.height, size.factor);
      for (const int64_t y : {rows.low, rows.high}) {
        if (n * size.height + y <= made) continue;
        made = n * size.height + y;
        activate_pixels<T, A>(input + made * row_size, size.width, size.channels,
                              affine.scale.data() + n * affine.padded,
                              affine.shift.data() + n * affine.padded, scratch.data() + y % 2 * scratch_size);
      }
      upsample_pixels<T, A>(scratch.data() + rows.low % 2 * scratch_size,
                            scratch.data() + rows.high % 2 * scratch_size, rows, size,
                            residual == nullptr ? nullptr : residual + n * large, out + n * large);
    }
  });
}

template <typename T>
void planes_forward(const T* input, const ChannelAffine<accumulate_t<T>>& affine, const MapSize& size,
                    const T* residual, T* out) {
  using A = accumulate_t<T>;
  const int64_t plane = size.height * size.width, factor = size.factor, large = plane * factor * factor;
  torch::stable::parallel_for(0, size.batch * size.channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> low(plane);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i / size.channels * affine.padded + i % size.channels;
      for (int64_t p = 0; p < plane; ++p) {
        const A value = static_cast<A>(input[i * plane + p]) * affine.scale[at] + affine.shift[at];
        low[p] = value <= A(0) ? A(0) : value;
      }
      for (int64_t row = 0; row <= size.height; ++row) {
        const Cell rows = cell_of(row, size.height, factor);
        for (int64_t column = 0; column <= size.width; ++column) {
          const Cell columns = cell_of(column, size.width, factor);
          const A *const above = low.data() + rows.low * size.width, *const below =
                                                                         low.data() + rows.high * size.width;
          for (int64_t k = rows.begin; k < rows.end; ++k) {
            const A y = cell_weight<A>(k, factor);
            const A left = above[columns.low] * (1 - y) + below[columns.low] * y,
                    right = above[columns.high] * (1 - y) + below[columns.high] * y;
            for (int64_t m = columns.begin; m < columns.end; ++m) {
              const A x = cell_weight<A>(m, factor);
              const int64_t to = i * large + (rows.first + k) * size.width * factor + columns.first + m;
              A value = left * (1 - x) + right * x;
              if (residual != nullptr) value += static_cast<A>(residual[to]);
              out[to] = static_cast<T>(value);
            }
          }
        }
      }
    }
  });
}

Tensor group_norm_relu_upsample(const Tensor& input, const Tensor& mean, const Tensor& rstd,
                                const Tensor& weight, const Tensor& bias, int64_t scale_factor,
                                const std::optional<Tensor>& residual) {
  const char* op = "group_norm_relu_upsample";
  check_group_norm_inputs(input, mean, rstd, weight, bias, op);
  check_scale_factor(scale_factor, op);
  if (residual) check_upsampled(*residual, input, scale_factor, "residual", op);
  const bool channels_last = is_channels_last(input);
  const auto layout = channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                    : torch::headeronly::MemoryFormat::Contiguous;
  const MapSize size{input.size(0), input.size(1), input.size(2), input.size(3), scale_factor};
  Tensor out = empty_nchw({size.batch, size.channels, size.height * scale_factor, size.width * scale_factor},
                          input, channels_last);
  if (out.numel() == 0) return out;
  const Tensor dense = torch::stable::contiguous(input, layout);
  const std::optional<Tensor> dense_residual =
      residual ? std::optional<Tensor>(torch::stable::contiguous(*residual, layout)) : std::nullopt;
  dispatch_floating(input.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ChannelAffine<accumulate_t<T>> affine(mean, rstd, weight, bias, op);
    const T* add = dense_residual ? dense_residual->const_data_ptr<T>() : nullptr;
    const auto forward = channels_last ? channels_last_forward<T> : planes_forward<T>;
    forward(dense.const_data_ptr<T>(), affine, size, add, out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panfpn_fast, CPU, m) {
  m.impl("group_norm_relu_upsample", TORCH_BOX(&group_norm_relu_upsample));
}

}  // namespace panfpn

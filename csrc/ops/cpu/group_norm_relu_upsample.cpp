// Each low-resolution row is normalised once, into scratch, and the outputs are mixed from there. Vectors run
// across the channels of a channels-last map, and along the rows of an NCHW map.
#include <optional>

#include "ops/cpu/channel_affine.h"
#include "ops/cpu/map_size.h"
#include "ops/cpu/pages.h"
#include "ops/upsample.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// to = low_weight * low + high_weight * high
template <typename A>
PANFPN_ALWAYS_INLINE void mix(const Lanes<A>& low, const Lanes<A>& high, A low_weight, A high_weight,
                              Lanes<A>& to) {
  to = low * low_weight + high * high_weight;
}

// Adds the residual, if there is one, and stores `count` lanes. `Whole` promises that these are all lanes.
template <typename T, typename A, bool Whole>
PANFPN_ALWAYS_INLINE void add_and_store(Lanes<A>& value, const T* residual, int64_t at, int64_t count,
                                        T* out) {
  if (residual != nullptr) {
    Lanes<A> add;
    if constexpr (Whole) {
      load_lanes(residual + at, add);
    } else {
      load_some<T, A>(residual + at, count, add);
    }
    value += add;
  }
  if constexpr (Whole) {
    store_lanes(value, out + at);
  } else {
    store_some<T, A>(value, count, out + at);
  }
}

// The four activations that a cell reads, for one vector of channels.
template <typename A>
struct Corners {
  const A *above_low, *above_high, *below_low, *below_high;

  Corners(const A* above, const A* below, const Cell& columns, int64_t padded)
      : above_low(above + columns.low * padded),
        above_high(above + columns.high * padded),
        below_low(below + columns.low * padded),
        below_high(below + columns.high * padded) {}

  PANFPN_ALWAYS_INLINE void load(int64_t channel, Lanes<A> (&corners)[4]) const {
    load_lanes(above_low + channel, corners[0]);
    load_lanes(above_high + channel, corners[1]);
    load_lanes(below_low + channel, corners[2]);
    load_lanes(below_high + channel, corners[3]);
  }
};

// Where a row of cells writes its outputs; `residual` is added to them, or is null.
template <typename T>
struct Target {
  const T* residual;
  T* out;
  int64_t row_stride, pixel_stride;
};

// Upsamples a cell of any size, all channels.
template <typename T, typename A>
PANFPN_ALWAYS_INLINE void upsample_cell(const Corners<A>& corners, int64_t rows, int64_t columns,
                                        const A* const (&y)[2], const A* const (&x)[2], int64_t channels,
                                        int64_t at, const Target<T>& target) {
  constexpr int L = kLanes<A>;
  for (int64_t c = 0; c < channels; c += L) {
    Lanes<A> corner[4], low, high, value;
    corners.load(c, corner);
    for (int64_t k = 0; k < rows; ++k) {
      mix<A>(corner[0], corner[2], y[0][k], y[1][k], low);
      mix<A>(corner[1], corner[3], y[0][k], y[1][k], high);
      for (int64_t m = 0; m < columns; ++m) {
        mix<A>(low, high, x[0][m], x[1][m], value);
        const int64_t to = at + k * target.row_stride + m * target.pixel_stride + c;
        if (channels - c >= L) {
          add_and_store<T, A, true>(value, target.residual, to, L, target.out);
        } else {
          add_and_store<T, A, false>(value, target.residual, to, channels - c, target.out);
        }
      }
    }
  }
}

// The same for cells of 2 x 2, whose weights are 3/4 for the nearer and 1/4 for the other input.
template <typename T, typename A, bool Residual>
PANFPN_ALWAYS_INLINE void upsample_cell_of_two(const Corners<A>& corners, int64_t channels, int64_t at,
                                               const Target<T>& target) {
  constexpr int L = kLanes<A>;
  const T* const residual = Residual ? target.residual : nullptr;
  const int64_t right = at + target.pixel_stride, below = at + target.row_stride,
                below_right = right + target.row_stride;
  for (int64_t c = 0; c + L <= channels; c += L) {
    Lanes<A> corner[4], low, high, value;
    corners.load(c, corner);
    mix<A>(corner[0], corner[2], A(0.75), A(0.25), low);
    mix<A>(corner[1], corner[3], A(0.75), A(0.25), high);
    mix<A>(low, high, A(0.75), A(0.25), value);
    add_and_store<T, A, true>(value, residual, at + c, L, target.out);
    mix<A>(low, high, A(0.25), A(0.75), value);
    add_and_store<T, A, true>(value, residual, right + c, L, target.out);
    mix<A>(corner[0], corner[2], A(0.25), A(0.75), low);
    mix<A>(corner[1], corner[3], A(0.25), A(0.75), high);
    mix<A>(low, high, A(0.75), A(0.25), value);
    add_and_store<T, A, true>(value, residual, below + c, L, target.out);
    mix<A>(low, high, A(0.25), A(0.75), value);
    add_and_store<T, A, true>(value, residual, below_right + c, L, target.out);
  }
}

// Upsamples a row of cells with `rows` rows of outputs, whose weights are `y`: from the low-resolution rows
// `above` and `below`, [width, padded channels], to outputs [rows, width * factor, channels].
template <typename T, typename A>
PANFPN_VECTOR_CLONES void upsample_pixels(const A* above, const A* below, int64_t rows,
                                          const A* const (&y)[2], const CellWeights<A>& weights,
                                          int64_t width, int64_t factor, int64_t channels, const T* residual,
                                          T* out) {
  const int64_t padded = padded_channels<A>(channels);
  const Target<T> target{residual, out, width * factor * channels, channels};
  const bool two = rows == 2 && factor == 2 && channels == padded;
  for (int64_t j = 0; j <= width; ++j) {
    const Cell cell = cell_at(j, width, factor);
    const Corners<A> corners(above, below, cell, padded);
    const int64_t at = cell.outputs.begin * channels;
    if (two && 0 < j && j < width) {
      if (residual == nullptr) {
        upsample_cell_of_two<T, A, false>(corners, channels, at, target);
      } else {
        upsample_cell_of_two<T, A, true>(corners, channels, at, target);
      }
    } else {
      const A* const x[2] = {weights.low(j, width), weights.high(j, width)};
      upsample_cell<T, A>(corners, rows, cell.outputs.size(), y, x, channels, at, target);
    }
  }
}

// A factor of 1: normalises channels-last pixels, each in one read and one write.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void normalise_pixels(const T* pixels, int64_t count, int64_t channels, const A* scale,
                                           const A* shift, const T* residual, T* out) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < count; ++i) {
    Lanes<A> lanes, scales, shifts;
    int64_t c = 0, at = i * channels;
    for (; c + L <= channels; c += L, at += L) {
      load_lanes(pixels + at, lanes);
      load_lanes(scale + c, scales);
      load_lanes(shift + c, shifts);
      normalise_relu<A>(lanes, scales, shifts, lanes);
      add_and_store<T, A, true>(lanes, residual, at, L, out);
    }
    if (c < channels) {
      load_some<T, A>(pixels + at, channels - c, lanes);
      load_lanes(scale + c, scales);
      load_lanes(shift + c, shifts);
      normalise_relu<A>(lanes, scales, shifts, lanes);
      add_and_store<T, A, false>(lanes, residual, at, channels - c, out);
    }
  }
}

// Calls activate(unit, y, row) for each low-resolution row, and emit(unit, i, above, below, more) for each
// row of cells, with the two halves of the scratch that hold its low-resolution rows. A unit is an image or a
// plane.
template <typename A, typename Activate, typename Emit>
void for_rows_of_cells(int64_t units, const MapSize& size, int64_t row_size, int64_t more,
                       const Activate& activate, const Emit& emit) {
  const int64_t cells = size.height + 1;
  const int64_t grain = grain_of(size.factor * size.factor * row_size);
  torch::stable::parallel_for(0, units * cells, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(2 * row_size + more);  // row y is in half y % 2
    int64_t last = -1;                            // the last row that was activated, counted over all units
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = i / cells;
      const Cell rows = cell_at(i % cells, size.height, size.factor);
      A* const halves[2] = {scratch.data(), scratch.data() + row_size};
      for (const int64_t y : {rows.low, rows.high}) {
        if (unit * size.height + y <= last) continue;
        last = unit * size.height + y;
        activate(unit, y, halves[y % 2]);
      }
      emit(unit, i % cells, halves[rows.low % 2], halves[rows.high % 2], scratch.data() + 2 * row_size);
    }
  });
}

template <typename T>
void upsample_channels_last(const T* input, const ChannelAffine<accumulate_t<T>>& affine, const MapSize& size,
                            const T* residual, T* out) {
  using A = accumulate_t<T>;
  const CellWeights<A> weights(size.factor);
  const int64_t row_size = size.width * size.channels, large_row = row_size * size.factor;
  for_rows_of_cells<A>(
      size.batch, size, size.width * affine.padded, 0,
      [&](int64_t n, int64_t y, A* to) {
        activate_pixels<T, A>(input + (n * size.height + y) * row_size, size.width, size.channels,
                              affine.scale.data() + n * affine.padded,
                              affine.shift.data() + n * affine.padded, to);
      },
      [&](int64_t n, int64_t i, const A* above, const A* below, A*) {
        const Cell rows = cell_at(i, size.height, size.factor);
        const A* const y[2] = {weights.low(i, size.height), weights.high(i, size.height)};
        const int64_t at = (n * size.height * size.factor + rows.outputs.begin) * large_row;
        upsample_pixels<T, A>(above, below, rows.outputs.size(), y, weights, size.width, size.factor,
                              size.channels, residual == nullptr ? nullptr : residual + at, out + at);
      });
}

// A plane is treated as pixels with as many "channels" as a vector has lanes, all with the same constants.
template <typename A>
struct PlaneAffine {
  A scale[kLanes<A>], shift[kLanes<A>];

  PlaneAffine(const ChannelAffine<A>& affine, int64_t n, int64_t channel) {
    std::fill(scale, scale + kLanes<A>, affine.scale[n * affine.padded + channel]);
    std::fill(shift, shift + kLanes<A>, affine.shift[n * affine.padded + channel]);
  }
};

// Merges even and odd outputs into consecutive ones, a first and a second half.
PANFPN_ALWAYS_INLINE void interleave(const Lanes<float>& even, const Lanes<float>& odd, Lanes<float>& first,
                                     Lanes<float>& second) {
  using Index = int32_t __attribute__((vector_size(64)));
  first = __builtin_shuffle(even, odd, Index{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
  second = __builtin_shuffle(even, odd, Index{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}
PANFPN_ALWAYS_INLINE void interleave(const Lanes<double>& even, const Lanes<double>& odd,
                                     Lanes<double>& first, Lanes<double>& second) {
  using Index = int64_t __attribute__((vector_size(64)));
  first = __builtin_shuffle(even, odd, Index{0, 8, 1, 9, 2, 10, 3, 11});
  second = __builtin_shuffle(even, odd, Index{4, 12, 5, 13, 6, 14, 7, 15});
}

template <typename T, typename A>
PANFPN_ALWAYS_INLINE void add_and_store_up_to(Lanes<A>& value, const T* residual, int64_t at, int64_t count,
                                              T* out) {
  if (count >= kLanes<A>) {
    add_and_store<T, A, true>(value, residual, at, count, out);
  } else if (count > 0) {
    add_and_store<T, A, false>(value, residual, at, count, out);
  }
}

// Writes one output row from the low-resolution rows `above` and `below` of a plane. In these, pixel x is at
// x + 1, and the first and the last pixel are repeated. `scratch` holds factor + 1 intermediate rows, each of
// `stride` values.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void upsample_row(const A* above, const A* below, A above_weight, A below_weight,
                                       const CellWeights<A>& weights, int64_t width, int64_t factor,
                                       int64_t stride, A* scratch, const T* residual, T* out) {
  constexpr int L = kLanes<A>;
  A* const line = scratch;
  for (int64_t i = 0; i < width + 2; i += L) {
    Lanes<A> upper, lower;
    load_lanes(above + i, upper);
    load_lanes(below + i, lower);
    mix<A>(upper, lower, above_weight, below_weight, upper);
    store_lanes(upper, line + i);
  }
  if (factor == 2) {
    for (int64_t x = 0; x < width; x += L) {
      Lanes<A> left, middle, right, even, odd, first, second;
      load_lanes(line + x, left);
      load_lanes(line + x + 1, middle);
      load_lanes(line + x + 2, right);
      mix<A>(left, middle, A(0.25), A(0.75), even);
      mix<A>(middle, right, A(0.75), A(0.25), odd);
      interleave(even, odd, first, second);
      add_and_store_up_to<T, A>(first, residual, 2 * x, 2 * (width - x), out);
      add_and_store_up_to<T, A>(second, residual, 2 * x + L, 2 * (width - x) - L, out);
    }
    return;
  }
  // For each phase q, output factor * x + q is in the cell before or after input x.
  for (int64_t q = 0; q < factor; ++q) {
    const int64_t after = q < factor / 2 ? 0 : 1, k = after ? q - factor / 2 : q + factor - factor / 2;
    const A low_weight = weights.low(1, 2)[k], high_weight = weights.high(1, 2)[k];
    for (int64_t x = 0; x < width; x += L) {
      Lanes<A> low, high;
      load_lanes(line + x + after, low);
      load_lanes(line + x + after + 1, high);
      mix<A>(low, high, low_weight, high_weight, low);
      store_lanes(low, scratch + (q + 1) * stride + x);
    }
  }
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t q = 0; q < factor; ++q) {
      A value = scratch[(q + 1) * stride + x];
      if (residual != nullptr) value += static_cast<A>(residual[x * factor + q]);
      out[x * factor + q] = static_cast<T>(value);
    }
  }
}

template <typename T>
void upsample_planes(const T* input, const ChannelAffine<accumulate_t<T>>& affine, const MapSize& size,
                     const T* residual, T* out) {
  using A = accumulate_t<T>;
  constexpr int64_t L = kLanes<A>;
  const CellWeights<A> weights(size.factor);
  const int64_t width = size.width, stride = width + 2 + L;  // a load may read one vector beyond the row
  const int64_t whole = width / L, rest = width % L, scratch_rows = size.factor == 2 ? 1 : size.factor + 1;
  for_rows_of_cells<A>(
      size.batch * size.channels, size, stride, scratch_rows * stride,
      [&](int64_t plane, int64_t y, A* to) {
        const PlaneAffine<A> constants(affine, plane / size.channels, plane % size.channels);
        const T* row = input + (plane * size.height + y) * width;
        activate_pixels<T, A>(row, whole, L, constants.scale, constants.shift, to + 1);
        if (rest > 0) {
          activate_pixels<T, A>(row + whole * L, 1, rest, constants.scale, constants.shift,
                                to + 1 + whole * L);
        }
        to[0] = to[1];
        to[width + 1] = to[width];
      },
      [&](int64_t plane, int64_t i, const A* above, const A* below, A* scratch) {
        const Cell rows = cell_at(i, size.height, size.factor);
        const A *above_weight = weights.low(i, size.height), *below_weight = weights.high(i, size.height);
        for (int64_t k = 0; k < rows.outputs.size(); ++k) {
          const int64_t at =
              (plane * size.height * size.factor + rows.outputs.begin + k) * size.large_width();
          upsample_row<T, A>(above, below, above_weight[k], below_weight[k], weights, width, size.factor,
                             stride, scratch, residual == nullptr ? nullptr : residual + at, out + at);
        }
      });
}

template <typename T>
void normalise_channels_last(const T* input, const ChannelAffine<accumulate_t<T>>& affine,
                             const MapSize& size, const T* residual, T* out) {
  using A = accumulate_t<T>;
  const int64_t row_size = size.width * size.channels;
  torch::stable::parallel_for(
      0, size.batch * size.height, grain_of(row_size), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t at = i * row_size, n = i / size.height;
          normalise_pixels<T, A>(input + at, size.width, size.channels,
                                 affine.scale.data() + n * affine.padded,
                                 affine.shift.data() + n * affine.padded,
                                 residual == nullptr ? nullptr : residual + at, out + at);
        }
      });
}

template <typename T>
void normalise_planes(const T* input, const ChannelAffine<accumulate_t<T>>& affine, const MapSize& size,
                      const T* residual, T* out) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  const int64_t whole = size.plane() / L, rest = size.plane() % L;
  torch::stable::parallel_for(
      0, size.batch * size.channels, grain_of(size.plane()), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const PlaneAffine<A> constants(affine, i / size.channels, i % size.channels);
          int64_t at = i * size.plane();
          const T* add = residual == nullptr ? nullptr : residual + at;
          normalise_pixels<T, A>(input + at, whole, L, constants.scale, constants.shift, add, out + at);
          at += whole * L;
          add = residual == nullptr ? nullptr : residual + at;
          if (rest > 0)
            normalise_pixels<T, A>(input + at, 1, rest, constants.scale, constants.shift, add, out + at);
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
  Tensor out = empty_nchw({size.batch, size.channels, size.height * scale_factor, size.large_width()}, input,
                          channels_last);
  if (out.numel() == 0) return out;
  const Tensor dense = torch::stable::contiguous(input, layout);
  const std::optional<Tensor> dense_residual =
      residual ? std::optional<Tensor>(torch::stable::contiguous(*residual, layout)) : std::nullopt;
  dispatch_floating(input.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ChannelAffine<accumulate_t<T>> affine(mean, rstd, weight, bias, op);
    const T* add = dense_residual ? dense_residual->const_data_ptr<T>() : nullptr;
    T* out_data = out.mutable_data_ptr<T>();
    advise_huge_pages(out_data, out.numel() * static_cast<int64_t>(sizeof(T)));
    const auto run = scale_factor == 1 ? (channels_last ? normalise_channels_last<T> : normalise_planes<T>)
                                       : (channels_last ? upsample_channels_last<T> : upsample_planes<T>);
    run(dense.const_data_ptr<T>(), affine, size, add, out_data);
  });
  return out;
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("group_norm_relu_upsample", TORCH_BOX(&group_norm_relu_upsample));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

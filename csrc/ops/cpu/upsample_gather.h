// The adjoint of bilinear upsampling by an integer factor, one low-resolution row at a time: each
// low-resolution pixel gathers its share of the gradients of the outputs around it, always in the same order.
#pragma once

#include <vector>

#include "ops/cpu/lanes.h"
#include "ops/cpu/map_size.h"
#include "ops/upsample.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// The output rows that read a low-resolution row, and their weights. Each thread reuses one object.
template <typename T, typename A>
class RowTaps {
 public:
  // Moves to row `y` of `height` low-resolution rows. The rows of `map` are `row_stride` values apart.
  void move_to(const T* map, int64_t row_stride, int64_t y, int64_t height, int64_t factor,
               const CellWeights<A>& weights) {
    rows_.clear();
    weights_.clear();
    add(map, row_stride, cell_at(y, height, factor), weights.high(y, height));
    add(map, row_stride, cell_at(y + 1, height, factor), weights.low(y + 1, height));
  }
  int64_t count() const { return static_cast<int64_t>(rows_.size()); }
  const T* row(int64_t i) const { return rows_[i]; }
  A weight(int64_t i) const { return weights_[i]; }

 private:
  void add(const T* map, int64_t row_stride, const Cell& cell, const A* weights) {
    for (int64_t row = cell.outputs.begin; row < cell.outputs.end; ++row) {
      const A weight = weights[row - cell.outputs.begin];
      if (weight == A(0)) continue;
      rows_.push_back(map + row * row_stride);
      weights_.push_back(weight);
    }
  }

  std::vector<const T*> rows_;
  std::vector<A> weights_;
};

// The same for exactly four rows, which a factor of 2 has except at the border: few enough for registers.
template <typename T, typename A>
class FourRowTaps {
 public:
  explicit FourRowTaps(const RowTaps<T, A>& taps) {
    for (int i = 0; i < 4; ++i) {
      rows_[i] = taps.row(i);
      weights_[i] = taps.weight(i);
    }
  }
  static constexpr int64_t count() { return 4; }
  const T* row(int64_t i) const { return rows_[i]; }
  A weight(int64_t i) const { return weights_[i]; }

 private:
  const T* rows_[4];
  A weights_[4];
};

// Sums the rows at one offset, for V vectors; a single vector may have only `rest` lanes.
template <typename T, typename A, int V, typename Taps>
PANFPN_ALWAYS_INLINE void sum_rows(const Taps& taps, int64_t offset, int64_t rest, Lanes<A> (&sum)[V]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] = Lanes<A>{};
  for (int64_t r = 0; r < taps.count(); ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Lanes<A> lanes;
      if (V > 1 || rest >= kLanes<A>) {
        load_lanes(taps.row(r) + offset + v * kLanes<A>, lanes);
      } else {
        load_some<T, A>(taps.row(r) + offset, rest, lanes);
      }
      sum[v] += lanes * taps.weight(r);
    }
  }
}

// Adds one column of outputs to the inputs on its left and on its right.
template <typename T, typename A, int V, typename Taps>
PANFPN_ALWAYS_INLINE void gather_column(const Taps& taps, int64_t offset, int64_t rest, A left_weight,
                                        A right_weight, Lanes<A> (&left)[V], Lanes<A> (&right)[V]) {
  Lanes<A> sum[V];
  sum_rows<T, A, V>(taps, offset, rest, sum);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    left[v] += sum[v] * left_weight;
    right[v] += sum[v] * right_weight;
  }
}

// Gathers a low-resolution row of a channels-last map for V vectors of channels from `first` on. Calls
// sink.put(x, lanes) for each pixel.
template <typename T, typename A, int V, typename Taps, typename Sink>
PANFPN_ALWAYS_INLINE void gather_channels(const Taps& taps, const CellWeights<A>& weights, int64_t width,
                                          int64_t factor, int64_t channels, int64_t first, Sink& sink) {
  const int64_t rest = channels - first;
  Lanes<A> carried[V]{}, left[V], right[V];  // carried: the share of the previous cell in its right input
  if (factor == 1) {
    for (int64_t x = 0; x < width; ++x) {
      sum_rows<T, A, V>(taps, x * channels + first, rest, left);
      sink.put(x, left);
    }
    return;
  }
  for (int64_t j = 0; j <= width; ++j) {
    const Cell cell = cell_at(j, width, factor);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) left[v] = right[v] = Lanes<A>{};
    if (factor == 2 && 0 < j && j < width) {
      const int64_t offset = cell.outputs.begin * channels + first;
      gather_column<T, A, V>(taps, offset, rest, A(0.75), A(0.25), left, right);
      gather_column<T, A, V>(taps, offset + channels, rest, A(0.25), A(0.75), left, right);
    } else {
      const A *low = weights.low(j, width), *high = weights.high(j, width);
      for (int64_t k = 0; k < cell.outputs.size(); ++k) {
        const int64_t offset = (cell.outputs.begin + k) * channels + first;
        gather_column<T, A, V>(taps, offset, rest, low[k], high[k], left, right);
      }
    }
    if (j > 0) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) left[v] += carried[v];
      sink.put(j - 1, left);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) carried[v] = right[v];
  }
}

// Gathers all channels of the row; sinks.at<V>(first channel) returns the sink for V vectors of channels.
template <typename T, typename A, typename Sinks>
PANFPN_ALWAYS_INLINE void gather_pixels(const RowTaps<T, A>& taps, const CellWeights<A>& weights,
                                        int64_t width, int64_t factor, int64_t channels, const Sinks& sinks) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) {
    auto sink = sinks.template at<4>(c);
    if (taps.count() == 4) {
      gather_channels<T, A, 4>(FourRowTaps<T, A>(taps), weights, width, factor, channels, c, sink);
    } else {
      gather_channels<T, A, 4>(taps, weights, width, factor, channels, c, sink);
    }
    sink.finish();
  }
  for (; c < channels; c += L) {
    auto sink = sinks.template at<1>(c);
    gather_channels<T, A, 1>(taps, weights, width, factor, channels, c, sink);
    sink.finish();
  }
}

// Splits consecutive values, the first and the second half of a run, into those with even and odd index.
PANFPN_ALWAYS_INLINE void deinterleave(const Lanes<float>& first, const Lanes<float>& second,
                                       Lanes<float>& even, Lanes<float>& odd) {
  using Index = int32_t __attribute__((vector_size(64)));
  even = __builtin_shuffle(first, second, Index{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
  odd = __builtin_shuffle(first, second, Index{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
}
PANFPN_ALWAYS_INLINE void deinterleave(const Lanes<double>& first, const Lanes<double>& second,
                                       Lanes<double>& even, Lanes<double>& odd) {
  using Index = int64_t __attribute__((vector_size(64)));
  even = __builtin_shuffle(first, second, Index{0, 2, 4, 6, 8, 10, 12, 14});
  odd = __builtin_shuffle(first, second, Index{1, 3, 5, 7, 9, 11, 13, 15});
}

// The size of `line` and of `to` in gather_plane_row.
template <typename A>
constexpr int64_t gather_scratch(int64_t width) {
  return width + 4 * kLanes<A>;
}

// Gathers a low-resolution row of a plane, [width]. `line` is scratch for one row of outputs.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void gather_plane_row(const RowTaps<T, A>& taps, const CellWeights<A>& weights,
                                           int64_t width, int64_t factor, A* line, A* to) {
  constexpr int L = kLanes<A>;
  const int64_t large = width * factor;
  line += 1;  // room for the repeated first value
  for (int64_t i = 0; i < large; i += L) {
    Lanes<A> sum[1];
    sum_rows<T, A, 1>(taps, i, large - i, sum);
    store_lanes(sum[0], line + i);
  }
  if (factor == 2) {
    // At the border only one input exists, and its two weights add up to 1.
    line[-1] = line[0];
    line[large] = line[large - 1];
    for (int64_t x = 0; x < width; x += L) {
      Lanes<A> first, second, before, low, high, after;
      load_lanes(line + 2 * x - 1, first);
      load_lanes(line + 2 * x - 1 + L, second);
      deinterleave(first, second, before, low);
      load_lanes(line + 2 * x + 1, first);
      load_lanes(line + 2 * x + 1 + L, second);
      deinterleave(first, second, high, after);
      low = (before + after) * A(0.25) + (low + high) * A(0.75);
      store_lanes(low, to + x);
    }
    return;
  }
  if (factor == 1) {
    std::copy(line, line + width, to);
    return;
  }
  std::fill(to, to + width, A(0));
  for (int64_t j = 0; j <= width; ++j) {
    const Cell cell = cell_at(j, width, factor);
    const A *low = weights.low(j, width), *high = weights.high(j, width);
    for (int64_t k = 0; k < cell.outputs.size(); ++k) {
      to[cell.low] += line[cell.outputs.begin + k] * low[k];
      to[cell.high] += line[cell.outputs.begin + k] * high[k];
    }
  }
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

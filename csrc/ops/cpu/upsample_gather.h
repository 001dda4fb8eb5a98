// The adjoint of bilinear upsampling by an integer factor, low row by low row: each low pixel gathers what
// the outputs around it give back, always in the same order.
#pragma once

#include "ops/cpu/upsample_cells.h"

namespace panfpn {

// The output rows that read a low row, and with what weight. A thread has one and moves it on.
template <typename T, typename A>
class RowTaps {
 public:
  // To low row `y` of `height`; `map` has rows of `row_stride` values.
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
    for (int64_t row = cell.begin; row < cell.end; ++row) {
      const A weight = weights[row - cell.begin];
      if (weight == A(0)) continue;
      rows_.push_back(map + row * row_stride);
      weights_.push_back(weight);
    }
  }

  std::vector<const T*> rows_;
  std::vector<A> weights_;
};

// The same where there are four, as a factor of 2 has them but for the border: few enough for registers.
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

// Sum over the rows at one place, for V registers; if there is only one, then its first `rest` lanes.
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

// One column of outputs, which its neighbours to the left and to the right have read.
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

// A low row of a channels-last map, for the V registers of channels from `first` on: sink.put(x, lanes) is
// called for each pixel.
template <typename T, typename A, int V, typename Taps, typename Sink>
PANFPN_ALWAYS_INLINE void gather_channels(const Taps& taps, const CellWeights<A>& weights, int64_t width,
                                          int64_t factor, int64_t channels, int64_t first, Sink& sink) {
  const int64_t rest = channels - first;
  Lanes<A> carried[V]{}, left[V], right[V];  // carried: what the cell before has for its right neighbour
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
      const int64_t offset = cell.begin * channels + first;
      gather_column<T, A, V>(taps, offset, rest, A(0.75), A(0.25), left, right);
      gather_column<T, A, V>(taps, offset + channels, rest, A(0.25), A(0.75), left, right);
    } else {
      const A *low = weights.low(j, width), *high = weights.high(j, width);
      for (int64_t o = cell.begin; o < cell.end; ++o) {
        gather_column<T, A, V>(taps, o * channels + first, rest, low[o - cell.begin], high[o - cell.begin],
                               left, right);
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

// All channels of the row; sinks.at<V>(first channel) makes the sink for V registers of them.
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

// A register of each half of a run: values in order -> those at even and at odd places.
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

// Values that `line` and `to` of gather_plane_row have room for.
template <typename A>
constexpr int64_t gather_scratch(int64_t width) {
  return width + 4 * kLanes<A>;
}

// A low row of a plane, [width]. `line` is scratch for one of its outputs' rows.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void gather_plane_row(const RowTaps<T, A>& taps, const CellWeights<A>& weights,
                                           int64_t width, int64_t factor, A* line, A* to) {
  constexpr int L = kLanes<A>;
  const int64_t large = width * factor;
  line += 1;  // for the repeated first value
  for (int64_t i = 0; i < large; i += L) {
    Lanes<A> sum[1];
    sum_rows<T, A, 1>(taps, i, large - i, sum);
    store_lanes(sum[0], line + i);
  }
  if (factor == 2) {
    // At the border both weights of the one input that is read add up to 1.
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
    for (int64_t o = cell.begin; o < cell.end; ++o) {
      to[cell.low] += line[o] * low[o - cell.begin];
      to[cell.high] += line[o] * high[o - cell.begin];
    }
  }
}

}  // namespace panfpn

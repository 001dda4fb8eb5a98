// Arg max over classes, with the classes in the lanes. Rows of the input, as [column, class], are mixed to a
// line of the output; then the columns of that line are mixed for each pixel, while the best class of each
// lane is tracked.
#pragma once

#include <limits>
#include <type_traits>

#include "ops/cpu/channel_block.h"
#include "ops/cpu/vector_exp.h"
#include "ops/range.h"
#include "ops/upsample_argmax.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// Class indices, one for each lane.
template <typename A>
struct ClassIndexOf {
  typedef int32_t type __attribute__((vector_size(64)));
};
template <>
struct ClassIndexOf<double> {
  typedef int64_t type __attribute__((vector_size(64)));
};
template <typename A>
using ClassIndex = typename ClassIndexOf<A>::type;
template <typename A>
using class_index_t = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

// 0, 1, 2, ...
template <typename A>
PANFPN_ALWAYS_INLINE void count_lanes(ClassIndex<A>& to) {
  constexpr class_index_t<A> kCounted[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  std::memcpy(&to, kCounted, sizeof(to));
}

// std::min might not be inlined.
PANFPN_ALWAYS_INLINE int64_t lesser(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// The logits of one image.
template <typename T>
struct LogitMap {
  const T* data;
  const T* end;  // end of the tensor
  int64_t channels, channel_stride, row_stride, pixel_stride;
};

// Loads up to kLanes numbers. The remaining lanes may hold the numbers that follow in the tensor.
template <typename T, typename A>
PANFPN_ALWAYS_INLINE void load_up_to(const T* from, int64_t count, const T* end, Lanes<A>& to) {
  if (end - from >= kLanes<A>) {
    load_lanes(from, to);
  } else {
    load_some<T, A>(from, lesser(count, end - from), to);
  }
}

PANFPN_ALWAYS_INLINE void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 2);
#endif
}

// Loads columns of an input row into `to` [columns, blocks]; returns whether the magnitudes of all numbers
// are below half of the largest finite number. Lanes beyond the last class hold minus this half. Writes
// columns up to the next multiple of kLanes.
template <typename T, typename A>
PANFPN_VECTOR_CLONES bool load_classes(const LogitMap<T>& map, int64_t row, int64_t first_column,
                                       int64_t columns, Block<A>* to) {
  constexpr int L = kLanes<A>;
  // Rounded weights can add up to more than 1. Then a mix of numbers near the largest one would be infinite,
  // and NaN in columns without weight; half of the range leaves room.
  constexpr A kLowest = std::numeric_limits<A>::lowest() / 2;
  const int64_t blocks = (map.channels + L - 1) / L;
  const T* from = map.data + row * map.row_stride + first_column * map.pixel_stride;
  Lanes<A> zeros{};  // becomes NaN with the first number that does not stay finite when doubled
  ClassIndex<A> lane;
  count_lanes<A>(lane);
  if (map.channel_stride == 1) {
    for (int64_t x = 0; x < columns; ++x) {
      for (int64_t b = 0; b < blocks; ++b) {
        Lanes<A> lanes;
        load_up_to<T, A>(from + x * map.pixel_stride + b * L, map.channels - b * L, map.end, lanes);
        if (b == blocks - 1) {
          lanes = lane < static_cast<class_index_t<A>>(map.channels - b * L) ? lanes : Lanes<A>{} + kLowest;
        }
        zeros += lanes * A(2) * A(0);
        store_lanes(lanes, to[x * blocks + b].lanes);
      }
    }
  } else {
    alignas(64) A rows[L * L];
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t classes = lesser(L, map.channels - b * L);
      for (A& number : rows) number = kLowest;
      for (int64_t x = 0; x < columns; x += L) {
        const ClassIndex<A> inside = lane < static_cast<class_index_t<A>>(lesser(L, columns - x));
        for (int64_t c = 0; c < classes; ++c) {
          const T* plane = from + (b * L + c) * map.channel_stride + x;
          Lanes<A> lanes;
          load_up_to<T, A>(plane, columns - x, map.end, lanes);
          // The next row. There are more planes than the processor's prefetcher tracks.
          prefetch(plane + map.row_stride);
          lanes = inside ? lanes : Lanes<A>{};
          zeros += lanes * A(2) * A(0);
          store_lanes(lanes, rows + c * L);
        }
        transpose_block(rows, to[x * blocks + b].lanes, blocks * L);
      }
    }
  }
  const ClassIndex<A> finite = zeros == zeros;
  bool all = true;
  for (int i = 0; i < L; ++i) all &= finite[i] != 0;
  return all;
}

// Mixes up to three rows of the input to a line of the output.
template <typename A, int kTaps>
PANFPN_ALWAYS_INLINE void mix_taps(const Block<A>* const (&rows)[3], const A* weight, int64_t begin,
                                   int64_t end, Block<A>* line) {
  for (int64_t i = begin; i < end; ++i) {
    Lanes<A> sum;
    load_lanes(rows[0][i].lanes, sum);
    sum *= weight[0];
    for (int k = 1; k < kTaps; ++k) {
      Lanes<A> lanes;
      load_lanes(rows[k][i].lanes, lanes);
      sum += lanes * weight[k];
    }
    store_lanes(sum, line[i].lanes);
  }
}

template <typename A>
PANFPN_VECTOR_CLONES void mix_rows(const Block<A>* const (&rows)[3], const ComposedTap<A>& tap,
                                   const Range* ranges, int64_t count, int64_t blocks, Block<A>* line) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = ranges[i].begin * blocks, end = ranges[i].end * blocks;
    if (tap.taps == 1) {
      mix_taps<A, 1>(rows, tap.weight, begin, end, line);
    } else if (tap.taps == 2) {
      mix_taps<A, 2>(rows, tap.weight, begin, end, line);
    } else {
      mix_taps<A, 3>(rows, tap.weight, begin, end, line);
    }
  }
}

// The columns that a pixel reads: offset of the first in blocks, their number, and their weights.
template <typename A>
struct PixelTap {
  int32_t offset, taps;
  A weight[3];
};

// A line of the output before its columns are mixed.
template <typename A>
struct ClassLine {
  const Block<A>* columns;
  int64_t blocks, channels;
  const PixelTap<A>* pixels;
};

// Mixes one block of a pixel's classes.
template <typename A>
PANFPN_ALWAYS_INLINE void interpolate(const Block<A>* column, int64_t blocks, const A* weight, int taps,
                                      Lanes<A>& value) {
  load_lanes(column->lanes, value);
  value *= weight[0];
  for (int k = 1; k < taps; ++k) {
    Lanes<A> lanes;
    load_lanes(column[k * blocks].lanes, lanes);
    value += lanes * weight[k];
  }
}

struct Larger {
  template <typename V>
  PANFPN_ALWAYS_INLINE static V of(const V& a, const V& b) {
    return a > b ? a : b;
  }
};
struct Smaller {
  template <typename V>
  PANFPN_ALWAYS_INLINE static V of(const V& a, const V& b) {
    return a < b ? a : b;
  }
};
struct Sum {
  template <typename V>
  PANFPN_ALWAYS_INLINE static V of(const V& a, const V& b) {
    return a + b;
  }
};

constexpr int kAtOnce = 4;  // pixels whose best values stay in registers

// Reduces the lanes of each of four vectors in memory to one number.
template <typename Op, typename E>
PANFPN_ALWAYS_INLINE void reduce_lanes(const E* registers, E* to) {
  constexpr int kEach = 16 / sizeof(E);
  typedef E Part __attribute__((vector_size(16)));
  Part of[kAtOnce];
#pragma GCC unroll 4
  for (int p = 0; p < kAtOnce; ++p) {
    Part part[4];
    std::memcpy(part, registers + p * 4 * kEach, sizeof(part));
    of[p] = Op::of(Op::of(part[0], part[1]), Op::of(part[2], part[3]));
  }
  if constexpr (kEach == 4) {
    using Places = int32_t __attribute__((vector_size(16)));
    const Places low{0, 4, 1, 5}, high{2, 6, 3, 7}, left{0, 1, 4, 5}, right{2, 3, 6, 7};
    const Part first = Op::of(__builtin_shuffle(of[0], of[1], low), __builtin_shuffle(of[0], of[1], high));
    const Part second = Op::of(__builtin_shuffle(of[2], of[3], low), __builtin_shuffle(of[2], of[3], high));
    const Part all = Op::of(__builtin_shuffle(first, second, left), __builtin_shuffle(first, second, right));
    std::memcpy(to, &all, sizeof(all));
  } else {
    for (int p = 0; p < kAtOnce; ++p) to[p] = Op::of(of[p][0], of[p][1]);
  }
}

// The largest number of pixels of a line that are labelled together. Lists of pixels have room for kAtOnce
// more entries, which must be valid pixels too.
constexpr int kBatch = 64;

template <typename A>
struct alignas(64) LaneBests {
  class_index_t<A> index[kBatch + kAtOnce][kLanes<A>];
  A value[kBatch + kAtOnce][kLanes<A>];
};

// Finds the best class of each lane. kTaps is at least the number of taps of every pixel.
template <typename A, int kTaps>
PANFPN_ALWAYS_INLINE void find_bests(const ClassLine<A>& line, const int32_t* pixels, int64_t count,
                                     LaneBests<A>& bests) {
  for (int64_t i = 0; i < count; i += kAtOnce) {
    const Block<A>* column[kAtOnce];
    const A* weight[kAtOnce];
    Lanes<A> best[kAtOnce];
    ClassIndex<A> index[kAtOnce], current;
    count_lanes<A>(current);
#pragma GCC unroll 4
    for (int p = 0; p < kAtOnce; ++p) {
      const PixelTap<A>& tap = line.pixels[pixels[i + p]];
      column[p] = line.columns + tap.offset;
      weight[p] = tap.weight;
      interpolate<A>(column[p], line.blocks, weight[p], kTaps, best[p]);
      index[p] = current;
    }
    for (int64_t b = 1; b < line.blocks; ++b) {
      current += kLanes<A>;
#pragma GCC unroll 4
      for (int p = 0; p < kAtOnce; ++p) {
        Lanes<A> value;
        interpolate<A>(column[p] + b, line.blocks, weight[p], kTaps, value);
        const ClassIndex<A> better = value > best[p];
        best[p] = better ? value : best[p];
        index[p] = better ? current : index[p];
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kAtOnce; ++p) {
      store_lanes(best[p], bests.value[i + p]);
      std::memcpy(bests.index[i + p], &index[p], sizeof(index[p]));
    }
  }
}

// Labels the pixels in a list and writes their largest logits in the order of the list. All numbers must be
// finite.
template <typename A, typename Label>
PANFPN_VECTOR_CLONES void label_pixels(const ClassLine<A>& line, int taps, const int32_t* pixels,
                                       int64_t count, Label* labels, A* largest) {
  LaneBests<A> bests;
  if (taps == 1) {
    find_bests<A, 1>(line, pixels, count, bests);
  } else if (taps == 2) {
    find_bests<A, 2>(line, pixels, count, bests);
  } else {
    find_bests<A, 3>(line, pixels, count, bests);
  }
  for (int64_t i = 0; i < count; i += kAtOnce) {
    reduce_lanes<Larger>(bests.value[i], largest + i);
    // Among lanes with equal values, the smallest class wins.
#pragma GCC unroll 4
    for (int p = 0; p < kAtOnce; ++p) {
      Lanes<A> value;
      ClassIndex<A> index, none = ClassIndex<A>{} + std::numeric_limits<class_index_t<A>>::max();
      load_lanes(bests.value[i + p], value);
      std::memcpy(&index, bests.index[i + p], sizeof(index));
      index = value == largest[i + p] ? index : none;
      std::memcpy(bests.index[i + p], &index, sizeof(index));
    }
    class_index_t<A> label[kAtOnce];
    reduce_lanes<Smaller>(bests.index[i], label);
    // The entries after the end of the list are pixels too, and get the same label as in their own turn.
#pragma GCC unroll 4
    for (int p = 0; p < kAtOnce; ++p) labels[pixels[i + p]] = static_cast<Label>(label[p]);
  }
}

// The same for numbers that may not be finite. NaN counts as the largest number, and only the columns that a
// pixel reads are considered.
template <typename A, typename Label>
PANFPN_VECTOR_CLONES void label_any_pixels(const ClassLine<A>& line, const int32_t* pixels, int64_t count,
                                           Label* labels, A* largest) {
  for (int64_t i = 0; i < count; ++i) {
    const PixelTap<A>& tap = line.pixels[pixels[i]];
    const Block<A>* column = line.columns + tap.offset;
    Lanes<A> best;
    interpolate<A>(column, line.blocks, tap.weight, tap.taps, best);
    ClassIndex<A> current;
    count_lanes<A>(current);
    ClassIndex<A> index = current;
    for (int64_t b = 1; b < line.blocks; ++b) {
      current += kLanes<A>;
      Lanes<A> value;
      interpolate<A>(column + b, line.blocks, tap.weight, tap.taps, value);
      const ClassIndex<A> better = (value > best) | ((value != value) & (best == best));
      best = better ? value : best;
      index = better ? current : index;
    }
    // The first lane is never padding, so its class is a valid start.
    int64_t label = index[0];
    A most = best[0];
    for (int l = 1; l < kLanes<A>; ++l) {
      const A value = best[l];
      const bool first = index[l] < label, is_nan = value != value, was_nan = most != most;
      if (index[l] >= line.channels || (was_nan && !is_nan)) continue;
      if (value > most || (is_nan && !was_nan) || ((value == most || was_nan) && first)) {
        label = index[l];
        most = value;
      }
    }
    labels[pixels[i]] = static_cast<Label>(label);
    largest[i] = most;
  }
}

// Computes the softmax probabilities of the labels from their logits.
template <typename A>
PANFPN_VECTOR_CLONES void top_probabilities(const ClassLine<A>& line, const int32_t* pixels, int64_t count,
                                            const A* largest, float* probabilities) {
  alignas(64) A sums[kBatch + kAtOnce][kLanes<A>];
  ClassIndex<A> lane;
  count_lanes<A>(lane);
  for (int64_t i = 0; i < count; ++i) {
    const PixelTap<A>& tap = line.pixels[pixels[i]];
    const Block<A>* column = line.columns + tap.offset;
    Lanes<A> sum{};
    for (int64_t b = 0; b < line.blocks; ++b) {
      Lanes<A> value, power;
      interpolate<A>(column + b, line.blocks, tap.weight, tap.taps, value);
      exp_lanes<A, false>(value - largest[i], power);
      if (b == line.blocks - 1) {
        power = lane < static_cast<class_index_t<A>>(line.channels - b * kLanes<A>) ? power : Lanes<A>{};
      }
      sum += power;
    }
    store_lanes(sum, sums[i]);
  }
  for (int64_t i = 0; i < count; i += kAtOnce) {
    for (int64_t p = count; p < i + kAtOnce; ++p) store_lanes(Lanes<A>{}, sums[p]);
    A total[kAtOnce];
    reduce_lanes<Sum>(sums[i], total);
    for (int64_t p = 0; p < lesser(kAtOnce, count - i); ++p) {
      probabilities[pixels[i + p]] = static_cast<float>(A(1) / total[p]);
    }
  }
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// Copies between feature maps and blocks. A block is [pixels, kLanes]: as many channels as a vector has
// lanes, in the type of the sums. So each pixel of a block is one vector, whatever the layout and dtype of
// the map.
#pragma once

#include <algorithm>

#include "ops/cpu/lanes.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

using Quad = float __attribute__((vector_size(16)));

// Transposes 4 x 4 numbers; the rows are `from_stride` and `to_stride` apart.
PANFPN_ALWAYS_INLINE void transpose_quads(const float* from, int64_t from_stride, float* to,
                                          int64_t to_stride) {
  using Index = int32_t __attribute__((vector_size(16)));
  Quad a, b, c, d;
  std::memcpy(&a, from, sizeof(a));
  std::memcpy(&b, from + from_stride, sizeof(b));
  std::memcpy(&c, from + 2 * from_stride, sizeof(c));
  std::memcpy(&d, from + 3 * from_stride, sizeof(d));
  const Quad ab_low = __builtin_shuffle(a, b, Index{0, 4, 1, 5}),
             ab_high = __builtin_shuffle(a, b, Index{2, 6, 3, 7}),
             cd_low = __builtin_shuffle(c, d, Index{0, 4, 1, 5}),
             cd_high = __builtin_shuffle(c, d, Index{2, 6, 3, 7});
  const Quad first = __builtin_shuffle(ab_low, cd_low, Index{0, 1, 4, 5}),
             second = __builtin_shuffle(ab_low, cd_low, Index{2, 3, 6, 7}),
             third = __builtin_shuffle(ab_high, cd_high, Index{0, 1, 4, 5}),
             fourth = __builtin_shuffle(ab_high, cd_high, Index{2, 3, 6, 7});
  std::memcpy(to, &first, sizeof(first));
  std::memcpy(to + to_stride, &second, sizeof(second));
  std::memcpy(to + 2 * to_stride, &third, sizeof(third));
  std::memcpy(to + 3 * to_stride, &fourth, sizeof(fourth));
}

// Transposes kLanes x kLanes numbers. `from` is contiguous; the rows of `to` are `to_stride` apart.
PANFPN_ALWAYS_INLINE void transpose_block(const float* from, float* to, int64_t to_stride = 16) {
  for (int row = 0; row < 16; row += 4) {
    for (int column = 0; column < 16; column += 4) {
      transpose_quads(from + row * 16 + column, 16, to + column * to_stride + row, to_stride);
    }
  }
}
PANFPN_ALWAYS_INLINE void transpose_block(const double* from, double* to, int64_t to_stride = 8) {
  for (int row = 0; row < 8; ++row) {
    for (int column = 0; column < 8; ++column) to[column * to_stride + row] = from[row * 8 + column];
  }
}

// `channels` planes of `count` contiguous pixels each -> block [count, kLanes]; missing channels are zero.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void planes_to_block(const T* planes, int64_t plane_stride, int64_t channels,
                                          int64_t count, A* block) {
  constexpr int L = kLanes<A>;
  alignas(64) A rows[L * L], columns[L * L];
  std::fill(rows, rows + L * L, A(0));
  for (int64_t i = 0; i < count; i += L) {
    const int64_t some = std::min<int64_t>(L, count - i);
    for (int64_t c = 0; c < channels; ++c) {
      Lanes<A> lanes;
      const T* from = planes + c * plane_stride + i;
      if (some == L) {
        load_lanes(from, lanes);
      } else {
        load_some<T, A>(from, some, lanes);
      }
      store_lanes(lanes, rows + c * L);
    }
    if (some == L) {
      transpose_block(rows, block + i * L);
    } else {
      transpose_block(rows, columns);
      std::copy(columns, columns + some * L, block + i * L);
    }
  }
}

// The inverse: block [count, kLanes] -> `channels` planes.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void block_to_planes(const A* block, int64_t count, T* planes, int64_t plane_stride,
                                          int64_t channels) {
  constexpr int L = kLanes<A>;
  alignas(64) A rows[L * L], columns[L * L];
  for (int64_t i = 0; i < count; i += L) {
    const int64_t some = std::min<int64_t>(L, count - i);
    if (some == L) {
      transpose_block(block + i * L, columns);
    } else {
      std::fill(rows, rows + L * L, A(0));
      std::copy(block + i * L, block + (i + some) * L, rows);
      transpose_block(rows, columns);
    }
    for (int64_t c = 0; c < channels; ++c) {
      Lanes<A> lanes;
      load_lanes(columns + c * L, lanes);
      T* to = planes + c * plane_stride + i;
      if (some == L) {
        store_lanes(lanes, to);
      } else {
        store_some<T, A>(lanes, some, to);
      }
    }
  }
}

// `channels` adjacent channels of `count` pixels that are `pixel_stride` apart -> block [count, kLanes].
template <typename T, typename A>
PANFPN_VECTOR_CLONES void pixels_to_block(const T* pixels, int64_t pixel_stride, int64_t channels,
                                          int64_t count, A* block) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < count; ++i) {
    Lanes<A> lanes;
    if (channels == L) {
      load_lanes(pixels + i * pixel_stride, lanes);
    } else {
      load_some<T, A>(pixels + i * pixel_stride, channels, lanes);
    }
    store_lanes(lanes, block + i * L);
  }
}

// The inverse: block [count, kLanes] -> `channels` adjacent channels of pixels.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void block_to_pixels(const A* block, int64_t count, T* pixels, int64_t pixel_stride,
                                          int64_t channels) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < count; ++i) {
    Lanes<A> lanes;
    load_lanes(block + i * L, lanes);
    if (channels == L) {
      store_lanes(lanes, pixels + i * pixel_stride);
    } else {
      store_some<T, A>(lanes, channels, pixels + i * pixel_stride);
    }
  }
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

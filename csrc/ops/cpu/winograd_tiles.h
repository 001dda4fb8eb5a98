// The tiles of feature maps: where they are, their pixels as vectors of 16 channels, and the transform of
// inputs.
#pragma once

#include <algorithm>
#include <type_traits>

#include "ops/cpu/channel_block.h"
#include "ops/cpu/winograd_product.h"
#include "ops/cpu/winograd_transform.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// Channels that are transformed together: a block.
constexpr int64_t kLane = 16;

// Pixels [rows, columns], `row` and `column` apart; each is a vector of channels.
template <typename T>
struct PixelGrid {
  T* first;
  int64_t row, column;

  T* at(int64_t y, int64_t x) const { return first + y * row + x * column; }
};

// Pixels [S, S] at any addresses, for tiles that cross the border of a map.
template <typename T, int S>
struct PixelTable {
  T* pixels[S][S];

  T* at(int64_t y, int64_t x) const { return pixels[y][x]; }
};

// A map [N, C, H, W], channels-last or NCHW. T is const for a map that is read.
template <typename T>
struct FeatureMap {
  T* data;
  int64_t channels, height, width;
  bool channels_last;

  // The number of blocks of channels.
  int64_t blocks() const { return (channels + kLane - 1) / kLane; }

  // Whether the channels are read or written where they are, by whole vectors.
  bool direct() const { return channels_last && channels % kLane == 0; }

  // The pixels of a channels-last map from (y, x) on, from a channel on.
  PixelGrid<T> grid(int64_t image, int64_t y, int64_t x, int64_t channel = 0) const {
    return {data + ((image * height + y) * width + x) * channels + channel, width * channels, channels};
  }

  // The same for a rectangle that crosses the border: pixels outside of the map are at `outside`.
  template <int N>
  PixelTable<T, N> table(int64_t image, int64_t y, int64_t x, T* outside, int64_t channel = 0) const {
    PixelTable<T, N> table;
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        const bool inside = y + i >= 0 && y + i < height && x + j >= 0 && x + j < width;
        table.pixels[i][j] = inside ? grid(image, y + i, x + j, channel).first : outside;
      }
    }
    return table;
  }

  // Copies 16 channels of a rectangle, with zeros outside of the map, to [rows, columns, 16].
  void read(int64_t image, int64_t channel, int64_t y, int64_t x, int64_t rows, int64_t columns,
            float* to) const {
    using Number = std::remove_const_t<T>;
    const int64_t some = std::min(kLane, channels - channel);
    const int64_t left = std::clamp<int64_t>(-x, 0, columns),
                  right = std::clamp<int64_t>(width - x, left, columns);
    for (int64_t i = 0; i < rows; ++i, to += columns * kLane) {
      if (y + i < 0 || y + i >= height) {
        std::fill(to, to + columns * kLane, 0.0f);
        continue;
      }
      std::fill(to, to + left * kLane, 0.0f);
      const T* const from = address(image, channel, y + i, x + left);
      if (channels_last) {
        pixels_to_block<Number, float>(from, channels, some, right - left, to + left * kLane);
      } else {
        planes_to_block<Number, float>(from, height * width, some, right - left, to + left * kLane);
      }
      std::fill(to + right * kLane, to + columns * kLane, 0.0f);
    }
  }

  // Copies [rows, columns, 16] to 16 channels of a rectangle, without the pixels outside of the map.
  void write(const float* from, int64_t image, int64_t channel, int64_t y, int64_t x, int64_t rows,
             int64_t columns) const {
    const int64_t some = std::min(kLane, channels - channel), inside = std::min(columns, width - x);
    for (int64_t i = 0; i < std::min(rows, height - y); ++i, from += columns * kLane) {
      T* const to = address(image, channel, y + i, x);
      if (channels_last) {
        block_to_pixels<T, float>(from, inside, to, channels, some);
      } else {
        block_to_planes<T, float>(from, inside, to, height * width, some);
      }
    }
  }

 private:
  T* address(int64_t image, int64_t channel, int64_t y, int64_t x) const {
    const int64_t pixel = y * width + x;
    return data + image * channels * height * width +
           (channels_last ? pixel * channels + channel : channel * height * width + pixel);
  }
};

// Consecutive tiles of one row: the image, the position of the first output, and the number of tiles.
struct Run {
  int64_t image, y, x, tiles;
};

// Tiles of M x M outputs over all images, in order.
template <int M>
struct TileGrid {
  int64_t batch, height, width;

  int64_t columns() const { return (width + M - 1) / M; }
  int64_t rows() const { return (height + M - 1) / M; }
  int64_t count() const { return batch * rows() * columns(); }

  // Calls f(run, index of its first tile) for tiles [first, first + count), in runs of `longest` tiles at
  // most.
  template <typename F>
  void for_each_run(int64_t first, int64_t count, int64_t longest, const F& f) const {
    for (int64_t i = 0; i < count;) {
      const int64_t row = (first + i) / columns(), column = (first + i) % columns();
      const int64_t length = std::min({columns() - column, count - i, longest});
      f(Run{row / rows(), row % rows() * M, column * M, length}, i);
      i += length;
    }
  }
};

// Calls f(pixels, i, channel, blocks) for tile i of a run and the blocks of channels from `channel` on.
// `pixels` are N x N, M apart from tile to tile, and begin `border` pixels above and left of the outputs.
// `zeros` has as many numbers as the map has channels; `patch` has room for N rows of all tiles, for a block.
template <int M, int N, typename T, typename F>
void for_pixels_of_tiles(const FeatureMap<const T>& map, const Run& run, int64_t border, const T* zeros,
                         float* patch, const F& f) {
  const int64_t y = run.y - border;
  if (map.direct()) {
    const bool rows_inside = y >= 0 && y + N <= map.height;
    for (int64_t i = 0; i < run.tiles; ++i) {
      const int64_t x = run.x + i * M - border;
      if (rows_inside && x >= 0 && x + N <= map.width) {
        f(map.grid(run.image, y, x), i, 0, map.blocks());
      } else {
        f(map.template table<N>(run.image, y, x, zeros), i, 0, map.blocks());
      }
    }
    return;
  }
  const int64_t columns = (run.tiles - 1) * M + N;
  for (int64_t c = 0; c < map.channels; c += kLane) {
    map.read(run.image, c, y, run.x - border, N, columns, patch);
    for (int64_t i = 0; i < run.tiles; ++i) {
      f(PixelGrid<const float>{patch + i * M * kLane, columns * kLane, kLane}, i, c, 1);
    }
  }
}

// The transforms to taps: of the inputs of a tile, and of the gradients of its outputs.
template <int M>
struct InputTransform {
  static constexpr int kPixels = M + 2, kTaps = M + 2;  // along each axis

  template <typename V>
  static PANFPN_ALWAYS_INLINE void apply(const V* d, V* t) {
    Winograd<M>::input(d, t);
  }
};
template <int M>
struct GradientTransform {
  static constexpr int kPixels = M, kTaps = M + 2;

  template <typename V>
  static PANFPN_ALWAYS_INLINE void apply(const V* y, V* t) {
    Winograd<M>::output_transposed(y, t);
  }
};

// Transforms pixels [kPixels, kPixels] to taps `tap_stride` apart, for `blocks` times 16 channels, which are
// `block_stride` apart there.
template <typename Transform, typename R, typename P>
PANFPN_VECTOR_CLONES void transform_pixels(const P& pixels, int64_t blocks, float* taps, int64_t tap_stride,
                                           int64_t block_stride) {
  using Vector = typename R::type;
  constexpr int N = Transform::kPixels, S = Transform::kTaps;
  for (int64_t c = 0; c < blocks * kLane; c += kWidth<R>) {
    Vector rows[S][N];
#pragma GCC unroll 6
    for (int x = 0; x < N; ++x) {
      Vector d[N], t[S];
#pragma GCC unroll 6
      for (int y = 0; y < N; ++y) load_lanes(pixels.at(y, x) + c, d[y]);
      Transform::apply(d, t);
#pragma GCC unroll 6
      for (int y = 0; y < S; ++y) rows[y][x] = t[y];
    }
    float* to = taps + c / kLane * block_stride + c % kLane;
#pragma GCC unroll 6
    for (int y = 0; y < S; ++y) {
      Vector t[S];
      Transform::apply(rows[y], t);
#pragma GCC unroll 6
      for (int x = 0; x < S; ++x, to += tap_stride) store_lanes(t[x], to);
    }
  }
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// The convolution of winograd.h, a template for the sources that instantiate it. A block of tiles goes
// through all three steps (transform of the inputs, products, transform of the products), with the outputs in
// parts, so that intermediate results stay in the caches. Threads take blocks when they are free.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/cpu/channel_block.h"
#include "ops/cpu/pages.h"
#include "ops/cpu/parallel.h"
#include "ops/cpu/winograd.h"
#include "ops/cpu/winograd_product.h"
#include "ops/cpu/winograd_transform.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// Channels that are transformed together: a block.
constexpr int64_t kLane = 16;
constexpr int64_t kGroup = WinogradTiles::kGroup;

// The outputs that are computed at a time, a panel of weights: their products stay in the L2 cache.
constexpr int64_t kPart = WinogradWeights::kPanel;

// The number of groups in a block. The panels of weights, which may come from the L3 cache or from memory,
// are read once for each block. With few channels they are small, and it matters more that the inputs stay in
// the L2 cache.
inline int64_t most_groups(int64_t channels) {
  return channels < 128 ? 2 : 4;
}

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

// Pixels [M + 2, M + 2] -> taps `tap_stride` apart, for `blocks` times 16 channels, which are `block_stride`
// apart there.
template <int M, typename R, typename P>
PANFPN_VECTOR_CLONES void transform_input(const P& pixels, int64_t blocks, float* taps, int64_t tap_stride,
                                          int64_t block_stride) {
  using Vector = typename R::type;
  constexpr int S = M + 2;
  for (int64_t c = 0; c < blocks * kLane; c += kWidth<R>) {
    Vector rows[S][S];
#pragma GCC unroll 6
    for (int x = 0; x < S; ++x) {
      Vector d[S], t[S];
#pragma GCC unroll 6
      for (int y = 0; y < S; ++y) load_lanes(pixels.at(y, x) + c, d[y]);
      Winograd<M>::input(d, t);
#pragma GCC unroll 6
      for (int y = 0; y < S; ++y) rows[y][x] = t[y];
    }
    float* to = taps + c / kLane * block_stride + c % kLane;
#pragma GCC unroll 6
    for (int y = 0; y < S; ++y) {
      Vector t[S];
      Winograd<M>::input(rows[y], t);
#pragma GCC unroll 6
      for (int x = 0; x < S; ++x, to += tap_stride) store_lanes(t[x], to);
    }
  }
}

// The products of a tile for `blocks` times 16 outputs, and what is added to them.
struct Products {
  const float* taps;
  int64_t tap_stride, blocks;
  const float* bias;
  bool add, relu;  // whether to add the residual; whether to apply ReLU
};

// Products -> M x M pixels.
template <int M, typename R, typename P, typename A>
PANFPN_VECTOR_CLONES void transform_output(const Products& from, const A& residual, const P& pixels) {
  using Vector = typename R::type;
  constexpr int S = M + 2;
  for (int64_t c = 0; c < from.blocks * kLane; c += kWidth<R>) {
    Vector rows[M][S], shift;
#pragma GCC unroll 6
    for (int x = 0; x < S; ++x) {
      Vector m[S], y[M];
#pragma GCC unroll 6
      for (int i = 0; i < S; ++i) load_lanes(from.taps + (i * S + x) * from.tap_stride + c, m[i]);
      Winograd<M>::output(m, y);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) rows[i][x] = y[i];
    }
    load_lanes(from.bias + c, shift);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      Vector y[M];
      Winograd<M>::output(rows[i], y);
#pragma GCC unroll 4
      for (int x = 0; x < M; ++x) {
        y[x] += shift;
        if (from.add) {
          Vector added;
          load_lanes(residual.at(i, x) + c, added);
          y[x] += added;
        }
        if (from.relu) y[x] = y[x] < 0.0f ? Vector{} : y[x];  // NaN stays
        store_lanes(y[x], pixels.at(i, x) + c);
      }
    }
  }
}

// Tiles of M x M outputs over all images, in order.
template <int M>
struct TileGrid {
  int64_t batch, height, width;

  int64_t columns() const { return (width + M - 1) / M; }
  int64_t rows() const { return (height + M - 1) / M; }
  int64_t count() const { return batch * rows() * columns(); }
};

// Consecutive tiles of one row: the image, the position of the first output, and the number of tiles.
struct Run {
  int64_t image, y, x, tiles;
};

template <int M, typename R, typename T>
class Convolution {
 public:
  Convolution(const float* weights, const ConvolutionMaps<T>& maps)
      : maps_(maps),
        grid_{maps.batch, maps.height, maps.width},
        layout_{maps.outputs, maps.channels, kTaps},
        tiles_{maps.channels},
        weights_(weights),
        bias_(layout_.padded()),
        zeros_(direct(maps.channels) ? maps.channels : 0) {
    if (maps.bias != nullptr) {
      std::transform(maps.bias, maps.bias + maps.outputs, bias_.begin(),
                     [](T value) { return static_cast<float>(value); });
    }
    const int64_t groups = (grid_.count() + kGroup - 1) / kGroup;
    const int64_t most = most_groups(maps.channels), blocks = (groups + most - 1) / most;
    block_ = (groups + blocks - 1) / blocks * kGroup;
    blocks_ = (grid_.count() + block_ - 1) / block_;
    // Few blocks are divided by outputs, although each part then transforms the inputs again.
    const int64_t items = 4 * torch::stable::get_num_threads(),
                  panels = (layout_.padded() + kPart - 1) / kPart;
    const int64_t parts = blocks_ < items ? std::min(panels, (items + blocks_ - 1) / blocks_) : 1;
    split_ = (panels + parts - 1) / parts * kPart;
    splits_ = (layout_.padded() + split_ - 1) / split_;
    part_ = std::min(kPart, layout_.padded());
    in_plane_ = block_ / kGroup * tiles_.group_size() + kLane;
    out_plane_ = block_ * part_ + kLane;
  }

  void run() const {
    parallel_in_chunks(blocks_ * splits_, 1, [&] {
      return [this, work = Workspace(*this), current = int64_t{-1}](int64_t begin, int64_t end) mutable {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t block = item / splits_, from = item % splits_ * split_;
          if (block != current) transform_inputs(block, work);
          current = block;
          const int64_t to = std::min(from + split_, layout_.padded());
          for (int64_t k = from; k < to; k += part_) multiply(block, k, std::min(part_, to - k), work);
        }
      };
    });
  }

 private:
  static constexpr int S = M + 2, kTaps = S * S;

  // The memory of one thread.
  struct Workspace {
    Scratch<float> inputs, products, patch, residual;

    explicit Workspace(const Convolution& of)
        : inputs(make_scratch<float>(kTaps * of.in_plane_)),
          products(make_scratch<float>(kTaps * of.out_plane_)),
          patch(make_scratch<float>(S * kPatchColumns * kLane)),
          residual(make_scratch<float>(S * kPatchColumns * kLane)) {
      // The unused rows of a partial group are multiplied too.
      std::fill(inputs.get(), inputs.get() + kTaps * of.in_plane_, 0.0f);
    }
  };

  static constexpr int64_t kPatchColumns = kGroup * M + 2;

  int64_t count(int64_t block) const { return std::min(block_, grid_.count() - block * block_); }

  // Calls f(run, index of its first tile in the block) for a block.
  template <typename F>
  void for_each_run(int64_t block, const F& f) const {
    const int64_t first = block * block_, tiles = count(block);
    for (int64_t i = 0; i < tiles;) {
      const int64_t row = (first + i) / grid_.columns(), column = (first + i) % grid_.columns();
      const int64_t length = std::min({grid_.columns() - column, tiles - i, kGroup});
      f(Run{row / grid_.rows(), row % grid_.rows() * M, column * M, length}, i);
      i += length;
    }
  }

  // The distance between adjacent channels in the maps.
  int64_t channel_stride() const { return maps_.channels_last ? 1 : maps_.height * maps_.width; }

  // Copies 16 channels of a rectangle of a map, with zeros outside of the map, to [height, width, 16].
  void read_patch(const T* map, int64_t channels, int64_t image, int64_t channel, int64_t y, int64_t x,
                  int64_t height, int64_t width, float* to) const {
    const int64_t some = std::min(kLane, channels - channel), pixel = maps_.channels_last ? channels : 1;
    const int64_t left = std::clamp<int64_t>(-x, 0, width),
                  right = std::clamp<int64_t>(maps_.width - x, left, width);
    const T* const first = map + image * channels * maps_.height * maps_.width + channel * channel_stride();
    for (int64_t i = 0; i < height; ++i, to += width * kLane) {
      if (y + i < 0 || y + i >= maps_.height) {
        std::fill(to, to + width * kLane, 0.0f);
        continue;
      }
      std::fill(to, to + left * kLane, 0.0f);
      const T* const from = first + ((y + i) * maps_.width + x + left) * pixel;
      if (maps_.channels_last) {
        pixels_to_block<T, float>(from, channels, some, right - left, to + left * kLane);
      } else {
        planes_to_block<T, float>(from, channel_stride(), some, right - left, to + left * kLane);
      }
      std::fill(to + right * kLane, to + width * kLane, 0.0f);
    }
  }

  // Copies a patch [height, width, 16] to the output.
  void write_patch(const float* from, int64_t image, int64_t channel, int64_t y, int64_t x, int64_t height,
                   int64_t width) const {
    const int64_t channels = maps_.outputs, some = std::min(kLane, channels - channel);
    const int64_t pixel = maps_.channels_last ? channels : 1;
    const int64_t inside = std::min(width, maps_.width - x);
    T* const first =
        maps_.output + image * channels * maps_.height * maps_.width + channel * channel_stride();
    for (int64_t i = 0; i < std::min(height, maps_.height - y); ++i, from += width * kLane) {
      T* const to = first + ((y + i) * maps_.width + x) * pixel;
      if (maps_.channels_last) {
        block_to_pixels<T, float>(from, inside, to, channels, some);
      } else {
        block_to_planes<T, float>(from, inside, to, channel_stride(), some);
      }
    }
  }

  // Whether the channels of a map are read or written where they are, by whole vectors.
  bool direct(int64_t channels) const { return maps_.channels_last && channels % kLane == 0; }

  // The pixels of a channels-last map from (y, x) on.
  template <typename P>
  PixelGrid<P> grid_of(P* map, int64_t channels, int64_t image, int64_t y, int64_t x) const {
    return {map + ((image * maps_.height + y) * maps_.width + x) * channels, maps_.width * channels,
            channels};
  }

  // The same for a rectangle that crosses the border: pixels outside of the map are at `outside`.
  template <int N, typename P>
  PixelTable<P, N> table_of(P* map, int64_t channels, int64_t image, int64_t y, int64_t x, P* outside) const {
    PixelTable<P, N> table;
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        const bool inside = y + i >= 0 && y + i < maps_.height && x + j >= 0 && x + j < maps_.width;
        table.pixels[i][j] =
            inside ? map + ((image * maps_.height + y + i) * maps_.width + x + j) * channels : outside;
      }
    }
    return table;
  }

  void transform_inputs(int64_t block, const Workspace& work) const {
    for_each_run(block, [&](const Run& run, int64_t index) {
      if (!direct(maps_.channels)) return transform_patch(run, index, work);
      const bool rows_inside = run.y > 0 && run.y + M < maps_.height;
      for (int64_t i = 0; i < run.tiles; ++i) {
        const int64_t x = run.x + i * M;
        float* const to = work.inputs.get() + tiles_.index(index + i);
        const int64_t blocks = maps_.channels / kLane;
        if (rows_inside && x > 0 && x + M < maps_.width) {
          const auto pixels = grid_of(maps_.input, maps_.channels, run.image, run.y - 1, x - 1);
          transform_input<M, R>(pixels, blocks, to, in_plane_, tiles_.block_size());
        } else {
          const auto pixels =
              table_of<S>(maps_.input, maps_.channels, run.image, run.y - 1, x - 1, zeros_.data());
          transform_input<M, R>(pixels, blocks, to, in_plane_, tiles_.block_size());
        }
      }
    });
  }

  void transform_patch(const Run& run, int64_t index, const Workspace& work) const {
    const int64_t columns = run.tiles * M + 2;
    for (int64_t c = 0; c < maps_.channels; c += kLane) {
      read_patch(maps_.input, maps_.channels, run.image, c, run.y - 1, run.x - 1, S, columns,
                 work.patch.get());
      for (int64_t i = 0; i < run.tiles; ++i) {
        const PixelGrid<const float> pixels{work.patch.get() + i * M * kLane, columns * kLane, kLane};
        transform_input<M, R>(pixels, 1,
                              work.inputs.get() + tiles_.index(index + i) + c / kLane * tiles_.block_size(),
                              in_plane_, 0);
      }
    }
  }

  // The outputs [first, first + count) of a block.
  void multiply(int64_t block, int64_t first, int64_t outputs, const Workspace& work) const {
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      multiply_panel<R>(tiles_, work.inputs.get() + tap * in_plane_, count(block),
                        weights_ + layout_.panel(first, tap), layout_.panel_width(first),
                        work.products.get() + tap * out_plane_, part_);
    }
    for_each_run(block, [&](const Run& run, int64_t index) {
      if (!direct(maps_.outputs)) return finish_patch(run, index, first, outputs, work);
      for (int64_t i = 0; i < run.tiles; ++i) {
        const int64_t x = run.x + i * M;
        const Products products = products_of(index + i, first, 0, outputs, work);
        T* const output = maps_.output + first;
        const T* const residual = (products.add ? maps_.residual : maps_.output) + first;
        if (run.y + M <= maps_.height && x + M <= maps_.width) {
          transform_output<M, R>(products, grid_of(residual, maps_.outputs, run.image, run.y, x),
                                 grid_of(output, maps_.outputs, run.image, run.y, x));
        } else {
          T* const outside = reinterpret_cast<T*>(work.patch.get());
          transform_output<M, R>(products,
                                 table_of<M, const T>(residual, maps_.outputs, run.image, run.y, x, outside),
                                 table_of<M>(output, maps_.outputs, run.image, run.y, x, outside));
        }
      }
    });
  }

  // The products of a tile for outputs [first + from, first + from + count), where the workspace begins at
  // `first`.
  Products products_of(int64_t tile, int64_t first, int64_t from, int64_t count,
                       const Workspace& work) const {
    return {work.products.get() + tile * part_ + from,
            out_plane_,
            count / kLane,
            bias_.data() + first + from,
            maps_.residual != nullptr,
            maps_.relu};
  }

  void finish_patch(const Run& run, int64_t index, int64_t first, int64_t outputs,
                    const Workspace& work) const {
    const int64_t columns = run.tiles * M;
    for (int64_t k = 0; k < std::min(outputs, maps_.outputs - first); k += kLane) {
      if (maps_.residual != nullptr) {
        read_patch(maps_.residual, maps_.outputs, run.image, first + k, run.y, run.x, M, columns,
                   work.residual.get());
      }
      for (int64_t i = 0; i < run.tiles; ++i) {
        const int64_t at = i * M * kLane;
        const PixelGrid<const float> residual{work.residual.get() + at, columns * kLane, kLane};
        const PixelGrid<float> pixels{work.patch.get() + at, columns * kLane, kLane};
        transform_output<M, R>(products_of(index + i, first, k, kLane, work), residual, pixels);
      }
      write_patch(work.patch.get(), run.image, first + k, run.y, run.x, M, columns);
    }
  }

  ConvolutionMaps<T> maps_;
  TileGrid<M> grid_;
  WinogradWeights layout_;
  WinogradTiles tiles_;
  const float* weights_;
  std::vector<float> bias_;
  std::vector<T> zeros_;
  int64_t block_, blocks_;         // tiles in a block; blocks
  int64_t split_, splits_, part_;  // outputs that an item computes; items per block; outputs at a time
  int64_t in_plane_, out_plane_;   // numbers of a tap
};

template <typename T>
void convolve(int64_t tile, const float* weights, const ConvolutionMaps<T>& maps) {
  advise_huge_pages(maps.output,
                    maps.batch * maps.outputs * maps.height * maps.width * static_cast<int64_t>(sizeof(T)));
  const auto run = [&](auto convolution) { convolution.run(); };
  if (has_wide_registers()) {
    tile == 2 ? run(Convolution<2, WideRegister, T>(weights, maps))
              : run(Convolution<4, WideRegister, T>(weights, maps));
  } else {
    tile == 2 ? run(Convolution<2, NarrowRegister, T>(weights, maps))
              : run(Convolution<4, NarrowRegister, T>(weights, maps));
  }
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

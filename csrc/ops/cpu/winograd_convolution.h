// The convolution of winograd.h, a template for the sources that instantiate it. A block of tiles goes
// through all three steps (transform of the inputs, products, transform of the products), with the outputs in
// parts, so that intermediate results stay in the caches. Threads take blocks when they are free.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/cpu/pages.h"
#include "ops/cpu/parallel.h"
#include "ops/cpu/winograd.h"
#include "ops/cpu/winograd_tiles.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

constexpr int64_t kGroup = WinogradTiles::kGroup;

// The outputs that are computed at a time, a panel of weights: their products stay in the L2 cache.
constexpr int64_t kPart = WinogradWeights::kPanel;

// The number of groups in a block. The panels of weights, which may come from the L3 cache or from memory,
// are read once for each block. With few channels they are small, and it matters more that the inputs stay in
// the L2 cache.
inline int64_t most_groups(int64_t channels) {
  return channels < 128 ? 2 : 4;
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

template <int M, typename R, typename T>
class Convolution {
 public:
  Convolution(const float* weights, const ConvolutionMaps<T>& maps)
      : maps_(maps),
        input_{maps.input, maps.channels, maps.height, maps.width, maps.channels_last},
        output_{maps.output, maps.outputs, maps.height, maps.width, maps.channels_last},
        residual_{maps.residual == nullptr ? maps.output : maps.residual, maps.outputs, maps.height,
                  maps.width, maps.channels_last},
        grid_{maps.batch, maps.height, maps.width},
        layout_{maps.outputs, maps.channels, kTaps},
        tiles_{maps.channels},
        weights_(weights),
        bias_(layout_.padded()),
        zeros_(input_.direct() ? maps.channels : 0) {
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

  void transform_inputs(int64_t block, const Workspace& work) const {
    grid_.for_each_run(block * block_, count(block), kGroup, [&](const Run& run, int64_t index) {
      for_pixels_of_tiles<M, S>(
          input_, run, 1, zeros_.data(), work.patch.get(),
          [&](const auto& pixels, int64_t i, int64_t channel, int64_t blocks) {
            float* const to =
                work.inputs.get() + tiles_.index(index + i) + channel / kLane * tiles_.block_size();
            transform_pixels<InputTransform<M>, R>(pixels, blocks, to, in_plane_, tiles_.block_size());
          });
    });
  }

  // The outputs [first, first + count) of a block.
  void multiply(int64_t block, int64_t first, int64_t outputs, const Workspace& work) const {
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      multiply_panel<R>(tiles_, work.inputs.get() + tap * in_plane_, count(block),
                        weights_ + layout_.panel(first, tap), layout_.panel_width(first),
                        work.products.get() + tap * out_plane_, part_);
    }
    grid_.for_each_run(block * block_, count(block), kGroup, [&](const Run& run, int64_t index) {
      if (!output_.direct()) return finish_patch(run, index, first, outputs, work);
      for (int64_t i = 0; i < run.tiles; ++i) {
        const int64_t x = run.x + i * M;
        const Products products = products_of(index + i, first, 0, outputs, work);
        if (run.y + M <= maps_.height && x + M <= maps_.width) {
          transform_output<M, R>(products, residual_.grid(run.image, run.y, x, first),
                                 output_.grid(run.image, run.y, x, first));
        } else {
          T* const outside = reinterpret_cast<T*>(work.patch.get());
          transform_output<M, R>(products, residual_.template table<M>(run.image, run.y, x, outside, first),
                                 output_.template table<M>(run.image, run.y, x, outside, first));
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
        residual_.read(run.image, first + k, run.y, run.x, M, columns, work.residual.get());
      }
      for (int64_t i = 0; i < run.tiles; ++i) {
        const int64_t at = i * M * kLane;
        const PixelGrid<const float> residual{work.residual.get() + at, columns * kLane, kLane};
        const PixelGrid<float> pixels{work.patch.get() + at, columns * kLane, kLane};
        transform_output<M, R>(products_of(index + i, first, k, kLane, work), residual, pixels);
      }
      output_.write(work.patch.get(), run.image, first + k, run.y, run.x, M, columns);
    }
  }

  ConvolutionMaps<T> maps_;
  FeatureMap<const T> input_;
  FeatureMap<T> output_;
  FeatureMap<const T> residual_;  // the output, which is not read, if there is no residual
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

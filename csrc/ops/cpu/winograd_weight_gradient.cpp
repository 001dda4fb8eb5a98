// The gradient of the weights is a sum over tiles: for each tap, the product of the transformed gradients of
// the outputs [tiles, K] with the transformed inputs [tiles, C]. Blocks of tiles are transformed one after
// the other; then each tap adds its product to a matrix [K, C]. So each sum has the same order for any number
// of threads.
#include <vector>

#include "ops/cpu/matrix.h"
#include "ops/cpu/parallel.h"
#include "ops/cpu/winograd.h"
#include "ops/cpu/winograd_tiles.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

constexpr int M = 4, S = M + 2, kTaps = S * S;

// Tiles whose products are summed one after the other.
constexpr int64_t kChain = 64;

// The longest run of tiles, which limits the scratch of a thread.
constexpr int64_t kLongest = 16;

// Adds to `to` [P rows, V registers], or replaces it: the sum over tiles of the products of P gradients with
// V registers of inputs. Both are blocks [tiles, 16]; the registers may be in adjacent blocks.
template <typename R, int P, int V>
PANFPN_VECTOR_CLONES void multiply_block(const float* gradients, const float* inputs, int64_t block_stride,
                                         int64_t tiles, bool add, float* to, int64_t to_stride) {
  using Vector = typename R::type;
  constexpr int L = kWidth<R>;
  for (int64_t first = 0; first < tiles; first += kChain) {
    Vector sum[P][V];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[p][v] = Vector{};
    }
    const int64_t end = std::min(first + kChain, tiles);
    for (int64_t t = first; t < end; ++t) {
      Vector input[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        load_lanes(inputs + v * L / kLane * block_stride + t * kLane + v * L % kLane, input[v]);
      }
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[p][v] += input[v] * gradients[t * kLane + p];
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* const at = to + p * to_stride + v * L;
        if (add || first > 0) {
          Vector before;
          load_lanes(at, before);
          sum[p][v] += before;
        }
        store_lanes(sum[p][v], at);
      }
    }
  }
}

// Taps [36] of 16 channels, `tap_stride` apart -> weights [3, 3] `stride` apart.
template <typename R>
PANFPN_VECTOR_CLONES void transform_taps(const float* taps, int64_t tap_stride, float (&to)[9][kLane]) {
  using Vector = typename R::type;
  for (int c = 0; c < kLane; c += kWidth<R>) {
    Vector rows[3][S];
#pragma GCC unroll 6
    for (int x = 0; x < S; ++x) {
      Vector u[S], g[3];
#pragma GCC unroll 6
      for (int y = 0; y < S; ++y) load_lanes(taps + (y * S + x) * tap_stride + c, u[y]);
      Winograd<M>::weights_transposed(u, g);
#pragma GCC unroll 3
      for (int y = 0; y < 3; ++y) rows[y][x] = g[y];
    }
#pragma GCC unroll 3
    for (int y = 0; y < 3; ++y) {
      Vector g[3];
      Winograd<M>::weights_transposed(rows[y], g);
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) store_lanes(g[x], to[y * 3 + x] + c);
    }
  }
}

template <typename R>
class WeightGradient {
 public:
  explicit WeightGradient(const WeightGradientMaps& maps)
      : input_{maps.input, maps.channels, maps.height, maps.width, maps.channels_last},
        gradient_{maps.gradient, maps.outputs, maps.height, maps.width, maps.channels_last},
        grid_{maps.batch, maps.height, maps.width},
        zeros_(std::max(maps.channels, maps.outputs)),
        block_(std::min(input_.blocks() + gradient_.blocks() <= 16 ? 2 * kChain : kChain, grid_.count())),
        inputs_{block_, input_.blocks()},
        gradients_{block_, gradient_.blocks()},
        sums_(make_scratch<float>(kTaps * sum_plane())) {}

  void run(float* to) const {
    for (int64_t first = 0; first < grid_.count(); first += block_) {
      const int64_t tiles = std::min(block_, grid_.count() - first);
      transform(first, tiles);
      add_products(tiles, first > 0);
    }
    finish(to);
  }

 private:
  // The transformed pixels of a block of tiles: [36, blocks of channels, tiles, 16].
  struct Taps {
    int64_t tiles, blocks;
    Scratch<float> data;

    Taps(int64_t tiles, int64_t blocks)
        : tiles(tiles), blocks(blocks), data(make_scratch<float>(kTaps * plane())) {}
    int64_t block_stride() const { return tiles * kLane; }
    // A few more numbers, so that the taps of a tile are in different sets of the cache.
    int64_t plane() const { return blocks * block_stride() + kLane; }
    float* at(int64_t tap, int64_t block, int64_t tile) const {
      return data.get() + tap * plane() + block * block_stride() + tile * kLane;
    }
  };

  int64_t row() const { return input_.blocks() * kLane; }
  int64_t sum_plane() const { return gradient_.blocks() * kLane * row() + kLane; }

  void transform(int64_t first, int64_t tiles) const {
    std::vector<std::pair<Run, int64_t>> runs;
    grid_.for_each_run(first, tiles, kLongest,
                       [&](const Run& run, int64_t index) { runs.emplace_back(run, index); });
    parallel_in_chunks(static_cast<int64_t>(runs.size()), 1, [&] {
      return [&, patch = make_scratch<float>(S * (kLongest * M + 2) * kLane)](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const auto& [run, index] = runs[r];
          for_pixels_of_tiles<M, S>(
              input_, run, 1, zeros_.data(), patch.get(),
              [&, index = index](const auto& pixels, int64_t i, int64_t channel, int64_t blocks) {
                transform_pixels<InputTransform<M>, R>(pixels, blocks,
                                                       inputs_.at(0, channel / kLane, index + i),
                                                       inputs_.plane(), inputs_.block_stride());
              });
          for_pixels_of_tiles<M, M>(
              gradient_, run, 0, zeros_.data(), patch.get(),
              [&, index = index](const auto& pixels, int64_t i, int64_t channel, int64_t blocks) {
                transform_pixels<GradientTransform<M>, R>(pixels, blocks,
                                                          gradients_.at(0, channel / kLane, index + i),
                                                          gradients_.plane(), gradients_.block_stride());
              });
        }
      };
    });
  }

  void add_products(int64_t tiles, bool add) const {
    // Blocks of 8 x 32 or, with registers of 32 bytes, 4 x 16 sums.
    constexpr int P = std::is_same_v<R, WideRegister> ? 8 : 4;
    constexpr int V = std::is_same_v<R, WideRegister> ? 2 : 16 / kWidth<R>;
    constexpr int64_t kStep = V * kWidth<R>;
    parallel_in_chunks(kTaps * gradient_.blocks(), 1, [&] {
      return [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t tap = item / gradient_.blocks(), k = item % gradient_.blocks();
          float* const rows = sums_.get() + tap * sum_plane() + k * kLane * row();
          for (int64_t c = 0; c < row(); c += kStep) {
            const auto multiply =
                row() - c >= kStep ? multiply_block<R, P, V> : multiply_block<R, P, (V + 1) / 2>;
            for (int64_t p = 0; p < kLane; p += P) {
              multiply(gradients_.at(tap, k, 0) + p, inputs_.at(tap, c / kLane, 0), inputs_.block_stride(),
                       tiles, add, rows + p * row() + c, row());
            }
          }
        }
      };
    });
  }

  // Writes [K, 3, 3, C].
  void finish(float* to) const {
    parallel_in_chunks(gradient_.channels, 4, [&] {
      return [&](int64_t begin, int64_t end) {
        float weights[9][kLane];
        for (int64_t k = begin; k < end; ++k) {
          for (int64_t c = 0; c < input_.channels; c += kLane) {
            transform_taps<R>(sums_.get() + k * row() + c, sum_plane(), weights);
            const int64_t some = std::min(kLane, input_.channels - c);
            for (int i = 0; i < 9; ++i) {
              std::copy(weights[i], weights[i] + some, to + (k * 9 + i) * input_.channels + c);
            }
          }
        }
      };
    });
  }

  FeatureMap<const float> input_, gradient_;
  TileGrid<M> grid_;
  std::vector<float> zeros_;
  int64_t block_;  // tiles
  Taps inputs_, gradients_;
  Scratch<float> sums_;  // [36, K, C], both padded to blocks
};

}  // namespace

void weight_gradient(const WeightGradientMaps& maps, float* to) {
  has_wide_registers() ? WeightGradient<WideRegister>(maps).run(to)
                       : WeightGradient<NarrowRegister>(maps).run(to);
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

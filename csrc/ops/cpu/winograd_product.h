// The products of Winograd's algorithm: for each tap, [tiles, channels] x [channels, outputs]. Both operands
// are in the order in which the innermost loop reads them.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "ops/cpu/lanes.h"
#include "ops/cpu/matrix.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// Vectors of the size of one register. The compiler keeps the parts of larger vectors in memory, so the type
// must fit the processor: has_wide_registers() decides.
struct WideRegister {
  typedef float type __attribute__((vector_size(64)));
};
struct NarrowRegister {
#if defined(__AVX__) || defined(PANFPN_HAS_VECTOR_CLONES)
  typedef float type __attribute__((vector_size(32)));
#else
  typedef float type __attribute__((vector_size(16)));
#endif
};
template <typename R>
inline constexpr int kWidth = sizeof(typename R::type) / sizeof(float);

// The transformed weights: panels of 32 outputs (16 in the last panel if that is enough), each as [taps,
// channels, outputs]. The outputs are padded with zeros to a multiple of 16. The order is the same on every
// processor, since networks with transformed weights are saved and sent.
struct WinogradWeights {
  static constexpr int64_t kPanel = 32;
  int64_t outputs, channels, taps;

  int64_t padded() const { return (outputs + 15) / 16 * 16; }
  int64_t size() const { return padded() * channels * taps; }
  int64_t panel_width(int64_t first) const { return std::min(kPanel, padded() - first); }
  // The index of the panel that begins at output `first`, a multiple of 32.
  int64_t panel(int64_t first, int64_t tap) const {
    return (first * taps + tap * panel_width(first)) * channels;
  }
};

// The transformed inputs of one tap: groups of 12 tiles, each as [channels / 16, 12, 16].
struct WinogradTiles {
  static constexpr int64_t kGroup = 12;
  int64_t channels;

  int64_t block_size() const { return kGroup * 16; }
  int64_t group_size() const { return (channels + 15) / 16 * block_size(); }
  int64_t index(int64_t tile) const { return tile / kGroup * group_size() + tile % kGroup * 16; }
};

// Channels that are summed one after the other. Sums of so few terms are then added, so that rounding errors
// grow more slowly than in one long sum.
constexpr int64_t kSummed = 64;

// [P, V registers] = tiles [channels, P] x panel [channels, V registers].
template <typename R, int P, int V>
PANFPN_VECTOR_CLONES void multiply_tiles(const float* tiles, const float* panel, int64_t panel_stride,
                                         int64_t channels, float* to, int64_t to_stride) {
  using Vector = typename R::type;
  constexpr int L = kWidth<R>;
  for (int64_t first = 0; first < channels; first += kSummed) {
    Vector sum[P][V];
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[p][v] = Vector{};
    }
    const int64_t end = std::min(first + kSummed, channels);
    for (int64_t block = first; block < end; block += 16, tiles += WinogradTiles::kGroup * 16) {
      const int64_t count = std::min<int64_t>(end - block, 16);
      for (int64_t c = 0; c < count; ++c, panel += panel_stride) {
        Vector weight[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) load_lanes(panel + v * L, weight[v]);
#pragma GCC unroll 12
        for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[p][v] += weight[v] * tiles[p * 16 + c];
        }
      }
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* const at = to + p * to_stride + v * L;
        if (first > 0) {
          Vector before;
          load_lanes(at, before);
          sum[p][v] += before;
        }
        store_lanes(sum[p][v], at);
      }
    }
  }
}

// The product of the first `count` tiles with a panel. `to` must have room for `count` rounded up to whole
// groups.
template <typename R>
void multiply_panel(const WinogradTiles& layout, const float* tiles, int64_t count, const float* panel,
                    int64_t width, float* to, int64_t to_stride) {
  for (int64_t first = 0; first < count; first += WinogradTiles::kGroup) {
    const float* const group = tiles + layout.index(first);
    float* const rows = to + first * to_stride;
    const int64_t left = count - first;
    if constexpr (std::is_same_v<R, WideRegister>) {
      const auto multiply = width == 32 ? (left > 8   ? multiply_tiles<R, 12, 2>
                                           : left > 4 ? multiply_tiles<R, 8, 2>
                                                      : multiply_tiles<R, 4, 2>)
                                        : (left > 8   ? multiply_tiles<R, 12, 1>
                                           : left > 4 ? multiply_tiles<R, 8, 1>
                                                      : multiply_tiles<R, 4, 1>);
      multiply(group, panel, width, layout.channels, rows, to_stride);
    } else {
      for (int64_t p = 0; p < std::min(left, WinogradTiles::kGroup); p += 6) {
        for (int64_t k = 0; k < width; k += 16) {
          multiply_tiles<R, 6, 16 / kWidth<R>>(group + p * 16, panel + k, width, layout.channels,
                                               rows + p * to_stride + k, to_stride);
        }
      }
    }
  }
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

#include "ops/cpu/winograd_convolution.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// 16 weights [C, 3, 3] from `weights` on -> taps `tap_stride` apart, channels `channel_stride` apart.
template <int M>
PANFPN_VECTOR_CLONES void transform_filters(const float* weights, int64_t count, int64_t channels, float* to,
                                            int64_t tap_stride, int64_t channel_stride) {
  constexpr int S = M + 2, D = 4;
  using Exact = double __attribute__((vector_size(32)));
  using Rounded = float __attribute__((vector_size(16)));
  alignas(64) double gathered[9][kLane] = {};
  for (int64_t c = 0; c < channels; ++c, to += channel_stride) {
    for (int64_t k = 0; k < count; ++k) {
      for (int i = 0; i < 9; ++i) gathered[i][k] = static_cast<double>(weights[(k * channels + c) * 9 + i]);
    }
    for (int d = 0; d < kLane; d += D) {
      Exact columns[3][S];  // transformed along y
      for (int x = 0; x < 3; ++x) {
        Exact g[3];
        for (int y = 0; y < 3; ++y) std::memcpy(&g[y], gathered[y * 3 + x] + d, sizeof(g[y]));
        Winograd<M>::weights(g, columns[x]);
      }
      for (int y = 0; y < S; ++y) {
        const Exact g[3] = {columns[0][y], columns[1][y], columns[2][y]};
        Exact u[S];
        Winograd<M>::weights(g, u);
        for (int x = 0; x < S; ++x) {
          const Rounded rounded = __builtin_convertvector(u[x], Rounded);
          std::memcpy(to + (y * S + x) * tap_stride + d, &rounded, sizeof(rounded));
        }
      }
    }
  }
}

template <int M>
void transform_all(const float* weights, const WinogradWeights& layout, float* to) {
  parallel_in_chunks(layout.padded() / kLane, 1, [&] {
    return [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * kLane; k < end * kLane; k += kLane) {
        const int64_t first = k / WinogradWeights::kPanel * WinogradWeights::kPanel;
        const int64_t width = layout.panel_width(first);
        transform_filters<M>(weights + k * layout.channels * 9, std::min(kLane, layout.outputs - k),
                             layout.channels, to + layout.panel(first, 0) + k - first,
                             width * layout.channels, width);
      }
    };
  });
}

}  // namespace

void transform_weights(int64_t tile, const float* weights, const WinogradWeights& layout, float* to) {
  (tile == 2 ? transform_all<2> : transform_all<4>)(weights, layout, to);
}

template void convolve(int64_t, const float*, const ConvolutionMaps<float>&);

}  // namespace panfpn::inline PANFPN_ARITHMETIC

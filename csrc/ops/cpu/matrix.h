// Products of a few pixels, in the L1 cache, with a matrix, in registers. This reaches the peak rate of the
// processor if the compiler may fuse multiplications and additions (PANFPN_FUSED_SOURCES in CMakeLists.txt).
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "ops/cpu/lanes.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

// Uninitialised memory, aligned to a cache line.
template <typename A>
using Scratch = std::unique_ptr<A[], FreeAligned>;

template <typename A>
Scratch<A> make_scratch(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(A);
  return Scratch<A>(static_cast<A*>(::operator new(bytes, std::align_val_t(64))));
}

// Returns whether functions with PANFPN_VECTOR_CLONES use 32 registers of 64 bytes on this processor. Without
// clones, the target of the compiler decides.
inline bool has_wide_registers() {
#if defined(__AVX512F__)
  return true;
#elif defined(PANFPN_HAS_VECTOR_CLONES)
  static const bool wide = __builtin_cpu_supports("avx512f");
  return wide;
#else
  return false;
#endif
}

// The layout of a matrix [K, C] for `multiply`: panels of a few vectors of outputs each, as [C, vectors of
// outputs]. The last panel is padded with zeros.
struct PanelLayout {
  int64_t outputs, channels;
  int lanes;
  int widest = has_wide_registers() ? 2 : 1;  // vectors of outputs in a panel

  int64_t padded() const { return (outputs + lanes - 1) / lanes * lanes; }
  int64_t size() const { return padded() * channels; }
  // Vectors of outputs in the panel that begins at output `first`.
  int64_t registers(int64_t first) const { return std::min<int64_t>((padded() - first) / lanes, widest); }
  // The index of a weight.
  int64_t index(int64_t output, int64_t channel) const {
    const int64_t panel = widest * lanes, first = output / panel * panel;
    return first * channels + channel * registers(first) * lanes + output - first;
  }
};

// The number of pixels that are multiplied at a time; a multiple of the numbers of pixels in `multiply`
// below.
constexpr int64_t kPixelTile = 24;

// [P, V vectors] = activations [P, channels] x panel [channels, V vectors] + bias. Pixels are `stride` apart
// in the activations and `to_stride` apart in the output.
template <typename A, int P, int V>
PANFPN_ALWAYS_INLINE void multiply_block(const A* activations, int64_t stride, const A* panel, const A* bias,
                                         int64_t channels, A* to, int64_t to_stride) {
  constexpr int L = kLanes<A>;
  Lanes<A> sum[P][V];
#pragma GCC unroll 24
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) load_lanes(bias + v * L, sum[p][v]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    Lanes<A> weight[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) load_lanes(panel + (c * V + v) * L, weight[v]);
#pragma GCC unroll 24
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[p][v] += weight[v] * activations[p * stride + c];
    }
  }
#pragma GCC unroll 24
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_lanes(sum[p][v], to + p * to_stride + v * L);
  }
}

template <typename A, int P, int V>
PANFPN_VECTOR_CLONES void multiply_panel(const A* activations, int64_t stride, const A* panel, const A* bias,
                                         int64_t channels, int64_t pixels, A* to, int64_t to_stride) {
  for (int64_t p = 0; p < pixels; p += P) {
    multiply_block<A, P, V>(activations + p * stride, stride, panel, bias, channels, to + p * to_stride,
                            to_stride);
  }
}

// [pixels, padded outputs] = activations [pixels, channels] x matrix + bias [padded outputs]. Activations and
// output must have room for `pixels` rounded up to kPixelTile.
template <typename A>
void multiply(const A* activations, int64_t stride, int64_t pixels, const PanelLayout& layout,
              const A* panels, const A* bias, A* to, int64_t to_stride) {
  for (int64_t first = 0; first < layout.padded();) {
    const int64_t registers = layout.registers(first);
    const auto panel = layout.widest == 1 ? multiply_panel<A, 6, 1>
                       : registers == 4   ? multiply_panel<A, 6, 4>
                       : registers == 3   ? multiply_panel<A, 8, 3>
                       : registers == 2   ? multiply_panel<A, 12, 2>
                                          : multiply_panel<A, 24, 1>;
    panel(activations, stride, panels + first * layout.channels, bias + first, layout.channels, pixels,
          to + first, to_stride);
    first += registers * layout.lanes;
  }
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

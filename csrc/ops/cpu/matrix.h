// Products of a few pixels, in the first cache, with a matrix, in registers: as fast as the processor
// multiplies and adds, if the compiler may fuse the two (-ffp-contract=fast, CMakeLists.txt).
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "ops/cpu/lanes.h"

namespace panfpn {

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

// Uninitialised numbers from the start of a cache line on.
template <typename A>
using Scratch = std::unique_ptr<A[], FreeAligned>;

template <typename A>
Scratch<A> make_scratch(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(A);
  return Scratch<A>(static_cast<A*>(::operator new(bytes, std::align_val_t(64))));
}

// Whether there are 32 registers of 64 bytes.
inline bool has_wide_registers() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool wide = __builtin_cpu_supports("avx512f");
  return wide;
#else
  return false;
#endif
}

// How a matrix [K, C] is stored for `multiply`: in panels of a few registers of outputs, [C, registers of
// outputs] each, the last ones filled up with zeros.
struct PanelLayout {
  int64_t outputs, channels;
  int lanes;
  int widest = has_wide_registers() ? 2 : 1;  // registers of outputs in a panel

  int64_t padded() const { return (outputs + lanes - 1) / lanes * lanes; }
  int64_t size() const { return padded() * channels; }
  // Registers of outputs in the panel that begins at output `first`.
  int64_t registers(int64_t first) const { return std::min<int64_t>((padded() - first) / lanes, widest); }
  // Where a weight is.
  int64_t index(int64_t output, int64_t channel) const {
    const int64_t panel = widest * lanes, first = output / panel * panel;
    return first * channels + channel * registers(first) * lanes + output - first;
  }
};

// Pixels are multiplied this many at a time; divisible by those of each block of registers below.
constexpr int64_t kPixelTile = 24;

// [P, V registers] = activations [P, channels] x panel [channels, V registers] + bias. Pixels of the two lie
// `stride` and `to_stride` apart.
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

// Products [pixels, padded outputs] of activations [pixels, channels] and a matrix, plus the bias [padded
// outputs]. There must be room for `pixels` rounded up to kPixelTile in both.
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

}  // namespace panfpn

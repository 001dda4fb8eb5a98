// The transforms of Winograd's algorithm F(M x M, 3 x 3) (Lavin and Gray, Fast Algorithms for Convolutional
// Neural Networks, CVPR 2016): A tile of M x M outputs is A^T [(G g G^T) * (B^T d B)] A for 3 x 3 weights g
// and (M + 2) x (M + 2) inputs d. Each struct has the product of one vector with B^T, A^T and G. The gradient
// of the weights, G^T [(A y A^T) * (B^T d B)] G for gradients y of the outputs, needs the transposed A and G
// too; only F(4 x 4) has them.
#pragma once

#include "ops/cpu/lanes.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

template <int kOutputs>
struct Winograd;

// The points 0, 1, -1 and infinity. All entries are 0, 1, -1, 1/2 or -1/2, so that the transforms of inputs
// and outputs round sums only.
template <>
struct Winograd<2> {
  template <typename V>
  static PANFPN_ALWAYS_INLINE void input(const V* d, V* t) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  }

  template <typename V>
  static PANFPN_ALWAYS_INLINE void output(const V* m, V* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }

  template <typename V>
  static PANFPN_ALWAYS_INLINE void weights(const V* g, V* u) {
    const V ends = g[0] + g[2];
    u[0] = g[0];
    u[1] = (ends + g[1]) * 0.5;
    u[2] = (ends - g[1]) * 0.5;
    u[3] = g[2];
  }
};

// The points 0, sqrt(1/2), -sqrt(1/2), sqrt(2), -sqrt(2) and infinity. With the usual 0, 1, -1, 2, -2 the
// entries range from 1/24 to 8, and the largest error is five times as large.
template <>
struct Winograd<4> {
  static constexpr double kSmall = 0.70710678118654752440, kLarge = 1.41421356237309504880;

  template <typename V>
  static PANFPN_ALWAYS_INLINE void input(const V* d, V* t) {
    constexpr float small = static_cast<float>(kSmall), large = static_cast<float>(kLarge);
    const V even_small = d[4] - 2.0f * d[2], odd_small = d[3] - 2.0f * d[1];
    const V even_large = d[4] - 0.5f * d[2], odd_large = d[3] - 0.5f * d[1];
    t[0] = d[0] + d[4] - 2.5f * d[2];
    t[1] = even_small + small * odd_small;
    t[2] = even_small - small * odd_small;
    t[3] = even_large + large * odd_large;
    t[4] = even_large - large * odd_large;
    t[5] = d[1] + d[5] - 2.5f * d[3];
  }

  template <typename V>
  static PANFPN_ALWAYS_INLINE void output(const V* m, V* y) {
    constexpr float small = static_cast<float>(kSmall), large = static_cast<float>(kLarge);
    const V even_small = m[1] + m[2], odd_small = small * (m[1] - m[2]);
    const V even_large = m[3] + m[4], odd_large = large * (m[3] - m[4]);
    y[0] = m[0] + even_small + even_large;
    y[1] = odd_small + odd_large;
    y[2] = 0.5f * even_small + 2.0f * even_large;
    y[3] = m[5] + 0.5f * odd_small + 2.0f * odd_large;
  }

  template <typename V>
  static PANFPN_ALWAYS_INLINE void weights(const V* g, V* u) {
    const V even_small = g[0] * (-2.0 / 3) - g[2] * (1.0 / 3), odd_small = g[1] * (-2.0 / 3 * kSmall);
    const V even_large = g[0] * (1.0 / 6) + g[2] * (1.0 / 3), odd_large = g[1] * (kLarge / 6);
    u[0] = g[0];
    u[1] = even_small + odd_small;
    u[2] = even_small - odd_small;
    u[3] = even_large + odd_large;
    u[4] = even_large - odd_large;
    u[5] = g[2];
  }

  // A y
  template <typename V>
  static PANFPN_ALWAYS_INLINE void output_transposed(const V* y, V* m) {
    constexpr float small = static_cast<float>(kSmall), large = static_cast<float>(kLarge);
    const V even_small = y[0] + 0.5f * y[2], odd_small = small * (y[1] + 0.5f * y[3]);
    const V even_large = y[0] + 2.0f * y[2], odd_large = large * (y[1] + 2.0f * y[3]);
    m[0] = y[0];
    m[1] = even_small + odd_small;
    m[2] = even_small - odd_small;
    m[3] = even_large + odd_large;
    m[4] = even_large - odd_large;
    m[5] = y[3];
  }

  // G^T u
  template <typename V>
  static PANFPN_ALWAYS_INLINE void weights_transposed(const V* u, V* g) {
    constexpr float third = static_cast<float>(1.0 / 3), two_thirds = static_cast<float>(2.0 / 3);
    constexpr float sixth = static_cast<float>(1.0 / 6);
    constexpr float odd_small = static_cast<float>(2.0 / 3 * kSmall),
                    odd_large = static_cast<float>(kLarge / 6);
    const V small = u[1] + u[2], large = u[3] + u[4];
    g[0] = u[0] - two_thirds * small + sixth * large;
    g[1] = odd_large * (u[3] - u[4]) - odd_small * (u[1] - u[2]);
    g[2] = third * (large - small) + u[5];
  }
};

}  // namespace panfpn::inline PANFPN_ARITHMETIC

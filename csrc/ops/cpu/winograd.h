// 3x3 convolution with stride 1 and padding 1 by Winograd's algorithm, in float32.
#pragma once

#include <cstdint>

#include "ops/cpu/winograd_product.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// The maps of a convolution: input [N, C, H, W], output and residual [N, K, H, W], all channels-last or all
// NCHW.
struct ConvolutionMaps {
  int64_t batch, channels, outputs, height, width;
  bool channels_last;
  const float* input;
  const float* bias;      // [K] or null
  const float* residual;  // or null
  float* output;
  bool relu;
};

// Transforms weights [K, C, 3, 3] for tiles of `tile` x `tile` outputs, 2 or 4.
void transform_weights(int64_t tile, const float* weights, const WinogradWeights& layout, float* to);

// Convolves with transformed weights, adds bias and residual and applies ReLU.
void convolve(int64_t tile, const float* weights, const ConvolutionMaps& maps);

}  // namespace panfpn::inline PANFPN_ARITHMETIC

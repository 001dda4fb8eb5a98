// 3x3 convolution with stride 1 and padding 1 by Winograd's algorithm. The maps are in float32,
// bfloat16 or float16, all arithmetic is in float32, and each output is rounded once.
#pragma once

#include <cstdint>

#include "ops/cpu/winograd_product.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// The maps of a convolution: input [N, C, H, W], output and residual [N, K, H, W], all channels-last or all
// NCHW.
template <typename T>
struct ConvolutionMaps {
  int64_t batch, channels, outputs, height, width;
  bool channels_last;
  const T* input;
  const T* bias;      // [K] or null
  const T* residual;  // or null
  T* output;
  bool relu;
};

// Transforms weights [K, C, 3, 3] for tiles of `tile` x `tile` outputs, 2 or 4.
void transform_weights(int64_t tile, const float* weights, const WinogradWeights& layout, float* to);

// Convolves with transformed weights, adds bias and residual and applies ReLU.
template <typename T>
void convolve(int64_t tile, const float* weights, const ConvolutionMaps<T>& maps);

// The maps of a convolution's backward pass: input [N, C, H, W] and the gradient of the output [N, K, H, W],
// both channels-last or both NCHW.
struct WeightGradientMaps {
  int64_t batch, channels, outputs, height, width;
  bool channels_last;
  const float* input;
  const float* gradient;
};

// Computes the gradient of the weights, as [K, 3, 3, C].
void weight_gradient(const WeightGradientMaps& maps, float* to);

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// Bilinear upsampling by an integer factor with align_corners=False: centres of pixels coincide, so output o
// reads the input at (o + 0.5) / factor - 0.5, not below 0. Integer arithmetic keeps the weights exact.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/host_device.h"

namespace panfpn {

// output = (1 - high_weight) * input[low] + high_weight * input[high], along one axis.
template <typename A>
struct UpsampleTap {
  int64_t low, high;
  A high_weight;
};

template <typename A>
PANFPN_HOST_DEVICE UpsampleTap<A> upsample_tap(int64_t output, int64_t factor, int64_t input_size) {
  const int64_t doubled = 2 * output + 1 - factor;  // the place in the input, times 2 * factor
  if (doubled <= 0) return {0, 0, A(0)};
  const int64_t low = doubled / (2 * factor);
  const int64_t high = low + 1 < input_size ? low + 1 : low;
  return {low, high, A(doubled - low * 2 * factor) / A(2 * factor)};
}

// The outputs [begin, end) that read an input: those less than one input pixel away, and all beyond the
// border for the first and the last.
struct UpsampleFootprint {
  int64_t begin, end;
};

PANFPN_HOST_DEVICE UpsampleFootprint upsample_footprint(int64_t input, int64_t factor, int64_t input_size) {
  // From (2 o + 1 - factor) / (2 factor) > input - 1, and < input + 1 = (input - 1) + 2.
  const int64_t begin = input == 0 ? 0 : (2 * factor * (input - 1) + factor - 1) / 2 + 1;
  const int64_t end = input + 1 >= input_size ? input_size * factor : (2 * factor * (input + 1) + factor) / 2;
  return {begin, end};
}

}  // namespace panfpn

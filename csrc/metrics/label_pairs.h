// Counts how often each pair of labels coincides in two maps. Panoptic quality needs nothing else from the
// pixels.
#pragma once

#include <cstdint>
#include <vector>

#include "arithmetic.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

struct LabelPair {
  uint32_t first, second;
  int64_t count;
};

// A label map: int32, or COCO's colours with 3 bytes per pixel, label = R + 256 G + 65536 B.
struct LabelMap {
  const void* data;
  bool is_rgb;
};

// The pairs that occur, in ascending order of (first, second).
std::vector<LabelPair> count_label_pairs(LabelMap first, LabelMap second, int64_t pixels);

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// How often each pair of labels meets in two maps: all that panoptic quality needs to know of the pixels.
#pragma once

#include <cstdint>
#include <vector>

namespace panfpn {

struct LabelPair {
  uint32_t first, second;
  int64_t count;
};

// A map of `pixels` labels: int32, or COCO's colours, 3 bytes a pixel with label = R + 256 G + 65536 B.
struct LabelMap {
  const void* data;
  bool is_rgb;
};

// The pairs that occur, in ascending order of (first, second).
std::vector<LabelPair> count_label_pairs(LabelMap first, LabelMap second, int64_t pixels);

}  // namespace panfpn

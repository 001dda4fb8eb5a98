// COCO's compressed run lengths: the lengths of alternating runs over an image, column by column. The first
// run is off and may be empty.
#pragma once

#include <cstdint>

#include "ops/host_device.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// The number of earlier ends of runs that run_number reads.
constexpr int kEarlierEnds = 3;

// Returns the number that stands for run `i`. The run ends before pixel *end, the run before it before pixel
// end[-1], and so on; the end before the first run is 0. From the fourth run on, the number is the difference
// from the length two runs before.
PANFPN_HOST_DEVICE int64_t run_number(int64_t i, const int64_t* end) {
  const int64_t length = end[0] - end[-1];
  return i > 2 ? length - (end[-2] - end[-3]) : length;
}

// The characters of a number: groups of five bits, lowest first. The sixth bit is set if more groups follow.
// Adding 48 makes the bytes printable.
class NumberText {
 public:
  PANFPN_HOST_DEVICE explicit NumberText(int64_t number) : rest_(number) {}

  // Whether another character follows.
  PANFPN_HOST_DEVICE bool more() const { return more_; }

  PANFPN_HOST_DEVICE uint8_t next() {
    const int group = static_cast<int>(rest_ & 31);
    rest_ >>= 5;  // keeps the sign, which is the fifth bit of the last group
    more_ = rest_ != ((group & 16) != 0 ? -1 : 0);
    return static_cast<uint8_t>(48 + group + (more_ ? 32 : 0));
  }

 private:
  int64_t rest_;
  bool more_ = true;
};

}  // namespace panfpn::inline PANFPN_ARITHMETIC

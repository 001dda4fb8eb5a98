// The sizes of a map and of the map that it is upsampled to, and how their rows are divided among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arithmetic.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// The small map and the factor.
struct MapSize {
  int64_t batch, channels, height, width, factor;

  int64_t plane() const { return height * width; }
  int64_t large_width() const { return width * factor; }
};

// Returns how many items a task gets, so that small maps do not wake another thread.
inline int64_t grain_of(int64_t values_per_item) {
  constexpr int64_t kValuesPerTask = int64_t{1} << 15;
  return std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, values_per_item));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

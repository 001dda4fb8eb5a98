// Bilinear upsampling by an integer factor, cell by cell: the outputs that lie between the same two low rows
// and the same two low columns read the same four inputs. Outputs before the first and beyond the last input
// make cells of their own, so that an axis of `size` inputs has size + 1 cells.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/cpu/lanes.h"

namespace panfpn {

// Along one axis cell i lies between the inputs i - 1 and i, of which only one exists at either end, and
// holds the outputs [begin, end).
struct Cell {
  int64_t low, high, begin, end;
};

inline Cell cell_at(int64_t i, int64_t size, int64_t factor) {
  const int64_t first = factor * (i - 1) + factor / 2;
  return {std::max<int64_t>(i - 1, 0), std::min(i, size - 1), std::max<int64_t>(first, 0),
          std::min(first + factor, size * factor)};
}

// Weights of the two inputs of a cell for each of its outputs. A cell at the border gives all weight to the
// input that exists.
template <typename A>
class CellWeights {
 public:
  explicit CellWeights(int64_t factor) : factor_(factor), values_(4 * factor, A(0)) {
    for (int64_t k = 0; k < factor; ++k) {
      values_[factor + k] = static_cast<A>(2 * k + 1 - factor % 2) / static_cast<A>(2 * factor);
      values_[k] = A(1) - values_[factor + k];
      values_[3 * factor + k] = A(1);
    }
  }
  const A* low(int64_t i, int64_t size) const { return part(i == 0 ? 2 : (i == size ? 3 : 0)); }
  const A* high(int64_t i, int64_t size) const { return part(i == 0 ? 3 : (i == size ? 2 : 1)); }

 private:
  const A* part(int64_t index) const { return values_.data() + index * factor_; }

  int64_t factor_;
  std::vector<A> values_;  // low, high, zeros, ones
};

// The small map and the factor.
struct MapSize {
  int64_t batch, channels, height, width, factor;

  int64_t plane() const { return height * width; }
  int64_t large_width() const { return width * factor; }
  int64_t large_plane() const { return plane() * factor * factor; }
};

// Outputs per task, so that small maps do not wake a thread.
constexpr int64_t kGrain = int64_t{1} << 15;

inline int64_t grain_of(int64_t values_per_item) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values_per_item));
}

}  // namespace panfpn

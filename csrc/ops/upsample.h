// Bilinear upsampling by an integer factor with align_corners=False, along one axis. Output o reads the input
// at (o + 0.5) / factor - 0.5, but not below 0. Integer arithmetic keeps the weights exact.
//
// The geometry has two forms. A tap gives the inputs of one output. A cell holds the `factor` outputs between
// the centres of two neighbouring inputs: they read the same two inputs, with weights that are the same in
// every cell. Cell i is between the inputs i - 1 and i. An axis of `size` inputs has size + 1 cells, because
// the outputs before the first and beyond the last centre form cells of their own, each with only one input.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops/host_device.h"
#include "ops/range.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// output = (1 - high_weight) * input[low] + high_weight * input[high].
template <typename A>
struct UpsampleTap {
  int64_t low, high;
  A high_weight;
};

template <typename A>
PANFPN_HOST_DEVICE UpsampleTap<A> upsample_tap(int64_t output, int64_t factor, int64_t input_size) {
  const int64_t doubled = 2 * output + 1 - factor;  // position in the input, times 2 * factor
  if (doubled <= 0) return {0, 0, A(0)};
  const int64_t low = doubled / (2 * factor);
  const int64_t high = low + 1 < input_size ? low + 1 : low;
  return {low, high, A(doubled - low * 2 * factor) / A(2 * factor)};
}

// The output at `phase` 0 to factor - 1 of a cell. In the first and the last cell, some outputs are outside
// of the map.
inline int64_t cell_output(int64_t cell, int64_t phase, int64_t factor) {
  return factor * (cell - 1) + factor / 2 + phase;
}

// The weight of the second input of a cell for each phase; the first input has 1 minus this weight.
template <typename A>
std::vector<A> phase_weights(int64_t factor) {
  std::vector<A> weights;
  for (int64_t phase = 0; phase < factor; ++phase) {
    weights.push_back(static_cast<A>(2 * phase + 1 - factor % 2) / static_cast<A>(2 * factor));
  }
  return weights;
}

// The phases of a cell whose outputs are inside the map.
inline Range cell_phases(int64_t cell, int64_t factor, int64_t size) {
  const int64_t first = cell_output(cell, 0, factor);
  return {std::max<int64_t>(0, -first), std::min(factor, size * factor - first)};
}

// A cell: its two inputs, which are the same input in the first and in the last cell, and its outputs inside
// the map.
struct Cell {
  int64_t low, high;
  Range outputs;
};

inline Cell cell_at(int64_t i, int64_t size, int64_t factor) {
  const int64_t first = cell_output(i, 0, factor);
  const Range phases = cell_phases(i, factor, size);
  return {std::max<int64_t>(i - 1, 0), std::min(i, size - 1), {first + phases.begin, first + phases.end}};
}

// The weights of a cell's two inputs for each of its outputs inside the map. In the first and the last cell,
// the one input that exists gets all weight.
template <typename A>
class CellWeights {
 public:
  explicit CellWeights(int64_t factor)
      : high_(phase_weights<A>(factor)), zeros_(factor, A(0)), ones_(factor, A(1)) {
    for (const A weight : high_) low_.push_back(A(1) - weight);
  }
  const A* low(int64_t i, int64_t size) const { return (i == 0 ? zeros_ : i == size ? ones_ : low_).data(); }
  const A* high(int64_t i, int64_t size) const {
    return (i == 0 ? ones_ : i == size ? zeros_ : high_).data();
  }

 private:
  std::vector<A> low_, high_, zeros_, ones_;
};

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// Rows of logits as upsample_cross_entropy reads them in both directions, and what it reads of the targets.
//
// An upsampling by a factor works cell by cell: the outputs between the centres of two neighbouring inputs
// mix those two, with `factor` weights that are the same everywhere. `size` inputs have size + 1 cells; the
// first and the last lie beyond the outermost centres. Pixels go into the lanes, one class after the other:
// each lane is a cell, so that one pair of registers serves all of its outputs, and nothing is summed across
// lanes.
#pragma once

#include <array>
#include <limits>
#include <type_traits>
#include <vector>

#include "ops/cpu/channel_block.h"
#include "ops/upsample_cross_entropy.h"

namespace panfpn {

// Output `phase` of a cell; may lie beyond the border.
inline int64_t cell_output(int64_t cell, int64_t phase, int64_t factor) {
  return factor * (cell - 1) + factor / 2 + phase;
}

// The weight of the input behind a cell's output; that before it has what is missing to 1.
template <typename A>
std::vector<A> phase_weights(int64_t factor) {
  std::vector<A> weights;
  for (int64_t phase = 0; phase < factor; ++phase) {
    weights.push_back(A(2 * phase + (factor % 2 == 0 ? 1 : 0)) / A(2 * factor));
  }
  return weights;
}

struct Range {
  int64_t begin, end;
};

// Which phases of a cell are outputs.
inline Range cell_phases(int64_t cell, int64_t factor, int64_t size) {
  const int64_t first = cell_output(cell, 0, factor);
  return {std::max<int64_t>(0, -first), std::min(factor, size * factor - first)};
}

// Which rows a row of cells mixes. Like PyTorch, the first cell multiplies its second row by zero, which
// matters to what is infinite.
struct CellRows {
  int64_t low, high;
  bool high_counts;
};

inline CellRows cell_rows(int64_t cell, int64_t height) {
  if (cell == 0) return {0, std::min<int64_t>(1, height - 1), false};
  return {cell - 1, std::min(cell, height - 1), true};
}

// Cells go to the threads in bands of rows. Where they are cut depends on the shape alone, so that the order
// of sums does not depend on the number of threads.
class Bands {
 public:
  explicit Bands(int64_t height) : cells_(height + 1) {
    constexpr int64_t kCount = 16, kMostRows = 16;  // 8 to 16 rows each, and work for many threads
    count_ = std::min(cells_, kCount * ((cells_ + kCount * kMostRows - 1) / (kCount * kMostRows)));
  }

  int64_t count() const { return count_; }
  Range cells(int64_t band) const { return {cells_ * band / count_, cells_ * (band + 1) / count_}; }

 private:
  int64_t cells_, count_;
};

// A register's worth of memory, aligned.
template <typename A>
struct alignas(64) Block {
  A lanes[kLanes<A>];
};
template <typename A>
using Scratch = std::vector<Block<A>>;

// How a row lies in scratch memory: planes [classes, stride], of which column x is at x + 1, between copies
// of its first and last column; cell q mixes q and q + 1. Two more planes follow the classes'.
struct RowShape {
  int64_t channels, width;

  int64_t cells() const { return width + 1; }
  // The number of registers is odd, so that the same column of all classes fits into a cache of few ways.
  template <typename A>
  int64_t blocks() const {
    return ((cells() + kLanes<A> - 1) / kLanes<A> + 1) | 1;
  }
  template <typename A>
  int64_t stride() const {
    return blocks<A>() * kLanes<A>;
  }
  // Of each column: the weighted sum of its logits, for label smoothing.
  int64_t sum_plane() const { return channels; }
  // 0, or NaN where a logit is not finite.
  int64_t finite_plane() const { return channels + 1; }
  int64_t planes() const { return channels + 2; }
};

// Where the numbers of one image lie, NCHW or channels-last.
template <typename T>
struct ImageLayout {
  T* data;
  T* end;  // of the tensor
  int64_t channels, height, width;
  bool channels_last;

  T* row(int64_t y) const { return data + y * width * (channels_last ? channels : 1); }
  int64_t plane() const { return height * width; }
};

template <typename T>
ImageLayout<T> image_layout(T* data, const Tensor& tensor, int64_t image) {
  const int64_t size = tensor.size(1) * tensor.size(2) * tensor.size(3);
  return {data + image * size, data + tensor.numel(), tensor.size(1),
          tensor.size(2),      tensor.size(3),        is_channels_last(tensor)};
}

// One row of an image -> `to` [planes, stride], each column less its largest logit: a mean of such columns is
// at most 0, and its softmax is that of the mean of the logits.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void load_logit_row(const ImageLayout<const T>& image, int64_t y, const RowShape& shape,
                                         const A* class_weights, A* to) {
  constexpr int L = kLanes<A>;
  const int64_t stride = shape.stride<A>(), channels = shape.channels, width = shape.width;
  const T* from = image.row(y);
  for (int64_t x = 0; x < width; x += L) {
    const int64_t some = std::min<int64_t>(L, width - x);
    if (image.channels_last) {
      alignas(64) A pixels[L * L], columns[L * L];
      std::memset(pixels, 0, sizeof(pixels));
      for (int64_t c = 0; c < channels; c += L) {
        const int64_t some_channels = std::min<int64_t>(L, channels - c);
        for (int64_t i = 0; i < some; ++i) {
          const T* pixel = from + (x + i) * channels + c;
          Lanes<A> lanes;
          if (image.end - pixel >= L) {
            load_lanes(pixel, lanes);
          } else {
            load_some<T, A>(pixel, some_channels, lanes);
          }
          store_lanes(lanes, pixels + i * L);
        }
        transpose_block(pixels, columns);
        for (int64_t i = 0; i < some_channels; ++i) {
          std::memcpy(to + (c + i) * stride + x + 1, columns + i * L, L * sizeof(A));
        }
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        const T* pixels = from + c * image.plane() + x;
        Lanes<A> lanes;
        if (some == L) {
          load_lanes(pixels, lanes);
        } else {
          load_some<T, A>(pixels, some, lanes);
        }
        store_lanes(lanes, to + c * stride + x + 1);
      }
    }
    const Lanes<A> zero{};
    Lanes<A> largest = zero - std::numeric_limits<A>::infinity(), sum = zero, finite = zero;
    for (int64_t c = 0; c < channels; ++c) {
      Lanes<A> lanes;
      load_lanes(to + c * stride + x + 1, lanes);
      largest = lanes > largest ? lanes : largest;
    }
    for (int64_t c = 0; c < channels; ++c) {
      Lanes<A> lanes;
      load_lanes(to + c * stride + x + 1, lanes);
      lanes -= largest;
      store_lanes(lanes, to + c * stride + x + 1);
      sum += lanes * class_weights[c];
      finite += lanes * A(0);
    }
    store_lanes(sum, to + shape.sum_plane() * stride + x + 1);
    store_lanes(finite, to + shape.finite_plane() * stride + x + 1);
  }
  for (int64_t c = 0; c < shape.planes(); ++c) {
    A* const plane = to + c * stride;
    plane[0] = plane[1] + A(0) * plane[std::min<int64_t>(2, width)];  // as with rows
    plane[width + 1] = plane[width];
  }
}

// Whether all logits of kLanes cells are finite. Where they are not PyTorch has NaN even for ignored pixels,
// whose zero gradients multiply them.
template <typename A>
bool block_is_finite(const A* low, const A* high, int64_t cell, const RowShape& shape) {
  const int64_t begin = shape.finite_plane() * shape.stride<A>() + cell;
  const int64_t end = begin + std::min<int64_t>(kLanes<A>, shape.cells() - cell) + 1;
  return std::all_of(low + begin, low + end, [](A zero) { return zero == 0; }) &&
         std::all_of(high + begin, high + end, [](A zero) { return zero == 0; });
}

// The classes of a label map, whatever its dtype.
struct Targets {
  const void* data;
  ScalarType dtype;
  int64_t channels, ignore_index;

  // Classes of the pixels [begin, end) -> `to`, -1 for those that are ignored; whether all of them exist
  // (those that do not are ignored as well).
  bool read(int64_t begin, int64_t end, int32_t* to) const {
    switch (dtype) {
      case ScalarType::Byte:
        return read_as<uint8_t>(begin, end, to);
      case ScalarType::Short:
        return read_as<int16_t>(begin, end, to);
      case ScalarType::Int:
        return read_as<int32_t>(begin, end, to);
      default:
        return read_as<int64_t>(begin, end, to);
    }
  }

  int64_t value(int64_t pixel) const {
    switch (dtype) {
      case ScalarType::Byte:
        return static_cast<const uint8_t*>(data)[pixel];
      case ScalarType::Short:
        return static_cast<const int16_t*>(data)[pixel];
      case ScalarType::Int:
        return static_cast<const int32_t*>(data)[pixel];
      default:
        return static_cast<const int64_t*>(data)[pixel];
    }
  }

 private:
  template <typename Label>
  bool read_as(int64_t begin, int64_t end, int32_t* to) const {
    // Narrow integers are what the compiler can vectorise.
    using Wide = std::conditional_t<(sizeof(Label) < 4), int32_t, int64_t>;
    const bool representable = ignore_index == static_cast<Label>(ignore_index);
    const Wide ignore = representable ? static_cast<Wide>(ignore_index) : std::numeric_limits<Wide>::min();
    const Wide classes = static_cast<Wide>(channels);
    const Label* labels = static_cast<const Label*>(data) + begin;
    int32_t missing = 0;
    for (int64_t i = 0; i < end - begin; ++i) {
      const Wide label = labels[i];
      const int32_t ignored = label == ignore, exists = (label >= 0) & (label < classes);
      missing |= 1 & ~(exists | ignored);
      to[i] = (exists & ~ignored) != 0 ? static_cast<int32_t>(label) : -1;
    }
    return missing == 0;
  }
};

// The loss of a pixel of class c is one_hot[c] * -log p_c + uniform * sum of weight[k] * -log p_k.
template <typename A>
struct ClassTerms {
  std::vector<A> weight, one_hot;
  A uniform;
  double weight_sum;

  ClassTerms(const std::optional<Tensor>& class_weights, int64_t channels, double label_smoothing)
      : weight(channels, A(1)),
        uniform(static_cast<A>(label_smoothing / static_cast<double>(channels))),
        weight_sum(0) {
    if (class_weights.has_value()) {
      const Tensor dense = torch::stable::contiguous(*class_weights);
      std::copy_n(dense.const_data_ptr<A>(), channels, weight.begin());
    }
    for (const A w : weight) {
      one_hot.push_back(static_cast<A>((1 - label_smoothing) * static_cast<double>(w)));
      weight_sum += static_cast<double>(w);
    }
  }
};

// The rows that a thread has at hand: two neighbours.
template <typename T>
class LogitRows {
  using A = accumulate_t<T>;

 public:
  explicit LogitRows(const RowShape& shape)
      : shape_(shape), blocks_(shape.planes() * shape.blocks<A>()), rows_(2 * blocks_), held_{-1, -1} {}

  // Turns to an image.
  void open(const ImageLayout<const T>& image, const ClassTerms<A>& terms) {
    image_ = image;
    terms_ = &terms;
    held_ = {-1, -1};
  }

  const A* get(int64_t y) {
    A* const row = rows_[y % 2 * blocks_].lanes;
    if (held_[y % 2] != y) load_logit_row<T, A>(image_, y, shape_, terms_->weight.data(), row);
    held_[y % 2] = y;
    return row;
  }

 private:
  RowShape shape_;
  int64_t blocks_;
  Scratch<A> rows_;
  ImageLayout<const T> image_{};
  const ClassTerms<A>* terms_ = nullptr;
  std::array<int64_t, 2> held_;
};

// Logits in a layout that can be read.
inline Tensor dense_logits(const Tensor& logits) {
  return is_channels_last(logits) ? logits : torch::stable::contiguous(logits);
}

}  // namespace panfpn

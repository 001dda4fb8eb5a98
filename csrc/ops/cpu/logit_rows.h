// Rows of logits, and targets, as both directions of upsample_cross_entropy read them.
//
// The upsampling works cell by cell (ops/upsample.h). The pixels of one class fill the lanes, one class after
// the other: each lane is a cell, so that one pair of vectors serves all outputs of its cells, and no sum
// runs across lanes.
#pragma once

#include <array>
#include <limits>
#include <type_traits>
#include <vector>

#include "ops/cpu/channel_block.h"
#include "ops/upsample_cross_entropy.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// The input rows that a row of cells reads. As in PyTorch, the first cell reads a second row and multiplies
// it by zero, which matters if that row has infinities.
struct CellRows {
  int64_t low, high;
  bool high_counts;
};

inline CellRows cell_rows(int64_t cell, int64_t height) {
  if (cell == 0) return {0, std::min<int64_t>(1, height - 1), false};
  return {cell - 1, std::min(cell, height - 1), true};
}

// Divides the rows of cells into bands, the work of one task. The division depends on the shape alone, so
// that the order of the sums does not depend on the number of threads.
class Bands {
 public:
  explicit Bands(int64_t height) : cells_(height + 1) {
    constexpr int64_t kCount = 16, kMostRows = 16;  // 8 to 16 rows each; enough tasks for many threads
    count_ = std::min(cells_, kCount * ((cells_ + kCount * kMostRows - 1) / (kCount * kMostRows)));
  }

  int64_t count() const { return count_; }
  Range cells(int64_t band) const { return {cells_ * band / count_, cells_ * (band + 1) / count_}; }

 private:
  int64_t cells_, count_;
};

// The layout of a row in scratch memory: planes [classes, stride]. Column x is at index x + 1, between copies
// of the first and the last column; cell q reads the indices q and q + 1. Two more planes follow the classes.
struct RowShape {
  int64_t channels, width;

  int64_t cells() const { return width + 1; }
  // The number of vectors is odd, so that the same column of all classes fits into a cache with few ways.
  template <typename A>
  int64_t blocks() const {
    return ((cells() + kLanes<A> - 1) / kLanes<A> + 1) | 1;
  }
  template <typename A>
  int64_t stride() const {
    return blocks<A>() * kLanes<A>;
  }
  // For each column, the weighted sum of its logits, for label smoothing.
  int64_t sum_plane() const { return channels; }
  // For each column, 0, or NaN if a logit is not finite.
  int64_t finite_plane() const { return channels + 1; }
  int64_t planes() const { return channels + 2; }
};

// The memory of one image, NCHW or channels-last.
template <typename T>
struct ImageLayout {
  T* data;
  T* end;  // end of the tensor
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

// Loads one row of an image into `to` [planes, stride] and subtracts the largest logit of each column from
// it. A weighted mean of such columns is at most 0, and its softmax equals the softmax of the mean of the
// logits.
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
    plane[0] = plane[1] + A(0) * plane[std::min<int64_t>(2, width)];  // as in CellRows
    plane[width + 1] = plane[width];
  }
}

// Returns whether all logits of kLanes cells are finite. If they are not, PyTorch returns NaN even for
// ignored pixels, because their zero gradients multiply these logits.
template <typename A>
bool block_is_finite(const A* low, const A* high, int64_t cell, const RowShape& shape) {
  const int64_t begin = shape.finite_plane() * shape.stride<A>() + cell;
  const int64_t end = begin + std::min<int64_t>(kLanes<A>, shape.cells() - cell) + 1;
  return std::all_of(low + begin, low + end, [](A zero) { return zero == 0; }) &&
         std::all_of(high + begin, high + end, [](A zero) { return zero == 0; });
}

// The classes of a label map of any integer dtype.
struct Targets {
  const void* data;
  ScalarType dtype;
  int64_t channels, ignore_index;

  // Reads the classes of the pixels [begin, end) into `to`, -1 for ignored ones. Returns whether all classes
  // exist; those that do not are ignored as well.
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
    // The compiler can vectorise narrow integers only.
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

// The loss of a pixel of class c is one_hot[c] * -log p_c + uniform * (sum over k of weight[k] * -log p_k).
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

// The two neighbouring rows that a thread currently uses.
template <typename T>
class LogitRows {
  using A = accumulate_t<T>;

 public:
  explicit LogitRows(const RowShape& shape)
      : shape_(shape), blocks_(shape.planes() * shape.blocks<A>()), rows_(2 * blocks_), held_{-1, -1} {}

  // Switches to an image.
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
  std::vector<Block<A>> rows_;
  ImageLayout<const T> image_{};
  const ClassTerms<A>* terms_ = nullptr;
  std::array<int64_t, 2> held_;
};

// Returns the logits in a layout that the kernels can read.
inline Tensor dense_logits(const Tensor& logits) {
  return is_channels_last(logits) ? logits : torch::stable::contiguous(logits);
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

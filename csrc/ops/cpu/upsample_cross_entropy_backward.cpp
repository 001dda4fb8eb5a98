// Each task owns a band of rows of cells. It computes the softmax of their outputs again and adds their
// contributions to the four inputs around each cell. The input row between two bands gets a part from each of
// them, in scratch memory; these parts are added at the end.
#include <algorithm>

#include "ops/cpu/logit_rows.h"
#include "ops/cpu/parallel.h"
#include "ops/cpu/vector_exp.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// The terms of the outputs at one position in each of kLanes cells: the logarithm of the sum of exponentials,
// and the factors that multiply the softmax in the gradients of the inputs before and after.
template <typename A>
struct PixelTerms {
  Block<A> log_sum, before, after;
};

// Adds the gradients through the sum of exponentials. `pixels` [rows, factor] are the outputs of kLanes
// cells; low_grad and high_grad are the gradients of their two rows of inputs, which may be the same row.
template <typename A>
PANFPN_VECTOR_CLONES void add_softmax(const A* low, const A* high, const A* high_weights, int64_t rows,
                                      const A* weights, int64_t factor, const PixelTerms<A>* pixels,
                                      int64_t channels, int64_t stride, A* low_grad, A* high_grad) {
  const auto add = [](A* to, const Lanes<A>& lanes) __attribute__((always_inline)) {
    Lanes<A> sum;
    load_lanes(to, sum);
    sum += lanes;
    store_lanes(sum, to);
  };
  for (int64_t c = 0; c < channels; ++c) {
    Lanes<A> low_before, low_after, high_before, high_after;
    load_lanes(low + c * stride, low_before);
    load_lanes(low + c * stride + 1, low_after);
    load_lanes(high + c * stride, high_before);
    load_lanes(high + c * stride + 1, high_after);
    Lanes<A> to_low_before{}, to_low_after{}, to_high_before{}, to_high_after{};
    const PixelTerms<A>* pixel = pixels;
    for (int64_t row = 0; row < rows; ++row) {
      const A high_weight = high_weights[row], low_weight = A(1) - high_weight;
      const Lanes<A> before = low_before * low_weight + high_before * high_weight;
      const Lanes<A> after = low_after * low_weight + high_after * high_weight;
      Lanes<A> to_before{}, to_after{};
      for (int64_t phase = 0; phase < factor; ++phase, ++pixel) {
        Lanes<A> log_sum, before_factor, after_factor, softmax;
        load_lanes(pixel->log_sum.lanes, log_sum);
        load_lanes(pixel->before.lanes, before_factor);
        load_lanes(pixel->after.lanes, after_factor);
        exp_lanes<A, false>(before * (A(1) - weights[phase]) + (after * weights[phase] - log_sum), softmax);
        to_before += softmax * before_factor;
        to_after += softmax * after_factor;
      }
      to_low_before += to_before * low_weight;
      to_low_after += to_after * low_weight;
      to_high_before += to_before * high_weight;
      to_high_after += to_after * high_weight;
    }
    add(low_grad + c * stride, to_low_before);
    add(low_grad + c * stride + 1, to_low_after);
    add(high_grad + c * stride, to_high_before);
    add(high_grad + c * stride + 1, to_high_after);
  }
}

// Stores a row of gradients from scratch memory into an image. The columns at the border belong to the
// outermost pixels. The sum of the uniform part is distributed to all classes by their weight.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void store_gradient_row(A* from, const RowShape& shape, const A* class_weights,
                                             bool has_uniform, const ImageLayout<T>& image, int64_t y) {
  constexpr int L = kLanes<A>;
  const int64_t stride = shape.stride<A>(), channels = shape.channels, width = shape.width;
  for (int64_t c = 0; c <= channels; ++c) {
    A* const plane = from + c * stride;
    plane[1] += plane[0];
    plane[width] += plane[width + 1];
  }
  T* const to = image.row(y);
  for (int64_t x = 0; x < width; x += L) {
    const int64_t some = std::min<int64_t>(L, width - x);
    Lanes<A> uniform{};
    if (has_uniform) load_lanes(from + channels * stride + x + 1, uniform);
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t some_channels = std::min<int64_t>(L, channels - c);
      alignas(64) A columns[L * L], pixels[L * L];
      for (int64_t i = 0; i < some_channels; ++i) {
        Lanes<A> lanes;
        load_lanes(from + (c + i) * stride + x + 1, lanes);
        if (has_uniform) lanes -= uniform * class_weights[c + i];
        if (image.channels_last) {
          store_lanes(lanes, columns + i * L);
        } else if (some == L) {
          store_lanes(lanes, to + (c + i) * image.plane() + x);
        } else {
          store_some<T, A>(lanes, some, to + (c + i) * image.plane() + x);
        }
      }
      if (!image.channels_last) continue;
      for (int64_t i = some_channels; i < L; ++i) store_lanes(Lanes<A>{}, columns + i * L);
      transpose_block(columns, pixels);
      for (int64_t i = 0; i < some; ++i) {
        Lanes<A> lanes;
        load_lanes(pixels + i * L, lanes);
        if (some_channels == L) {
          store_lanes(lanes, to + (x + i) * channels + c);
        } else {
          store_some<T, A>(lanes, some_channels, to + (x + i) * channels + c);
        }
      }
    }
  }
}

template <typename A>
struct SavedMaps {
  const A* log_sum_exp;
  const A* grad;  // of each pixel's loss; if null, every pixel has `scale`
  A scale;
};

// The contributions of values to the four inputs around them, summed up.
template <typename A>
struct Corners {
  A low_before = 0, low_after = 0, high_before = 0, high_after = 0;

  void add(A value, A high_weight, A after_weight) {
    const A after = value * after_weight, before = value - after;
    high_before += before * high_weight;
    high_after += after * high_weight;
    low_before += before * (A(1) - high_weight);
    low_after += after * (A(1) - high_weight);
  }

  void add_to(A* low, A* high) const {
    low[0] += low_before;
    low[1] += low_after;
    high[0] += high_before;
    high[1] += high_after;
  }
};

// The memory that a thread needs for rows of cells.
template <typename A>
class GradientRow {
 public:
  GradientRow(const RowShape& shape, int64_t height, int64_t factor, const ClassTerms<A>& terms,
              const Targets& targets, const SavedMaps<A>& maps)
      : shape_(shape),
        height_(height),
        factor_(factor),
        terms_(terms),
        targets_(targets),
        maps_(maps),
        weights_(phase_weights<A>(factor)),
        pixels_(std::min(most_rows(), factor) * factor),
        classes_(std::ssize(pixels_) * kLanes<A>) {}

  // Computes one row of cells of an image. `low` and `high` are its rows of logits, low_grad and high_grad
  // their gradients.
  void run(int64_t image, int64_t cell_y, const A* low, const A* high, bool high_counts, A* low_grad,
           A* high_grad) {
    const Range phases = cell_phases(cell_y, factor_, height_);
    for (int64_t phase = phases.begin; phase < phases.end; phase += most_rows()) {
      high_weights_.clear();
      for (int64_t p = phase; p < std::min(phase + most_rows(), phases.end); ++p) {
        high_weights_.push_back(high_counts ? weights_[p] : A(0));
      }
      const int64_t first_row = image * height_ * factor_ + cell_output(cell_y, phase, factor_);
      for (int64_t cell = 0; cell < shape_.cells(); cell += kLanes<A>) {
        const bool counts = read_classes(first_row, cell);
        if (!counts && block_is_finite(low, high, cell, shape_)) continue;
        set_pixels(first_row, cell, low_grad + cell, high_grad + cell);
        add_softmax<A>(low + cell, high + cell, high_weights_.data(), rows(), weights_.data(), factor_,
                       pixels_.data(), shape_.channels, shape_.stride<A>(), low_grad + cell,
                       high_grad + cell);
      }
    }
  }

 private:
  // The number of output rows that are processed together: all rows of a cell if there are few.
  int64_t most_rows() const { return std::max<int64_t>(1, 64 / factor_); }
  static constexpr int32_t kOutside = -2;  // instead of a class: outside of the map
  int64_t rows() const { return static_cast<int64_t>(high_weights_.size()); }

  // Reads the classes of all outputs of kLanes cells, row by row, into classes_. Returns whether any of them
  // counts.
  bool read_classes(int64_t first_row, int64_t cell) {
    const int64_t width = shape_.width * factor_, count = factor_ * kLanes<A>;
    const int64_t first = cell_output(cell, 0, factor_);
    const int64_t begin = std::max<int64_t>(0, first), end = std::min(width, first + count);
    std::fill(classes_.begin(), classes_.end(), kOutside);
    for (int64_t row = 0; row < rows() && begin < end; ++row) {
      const int64_t start = (first_row + row) * width;
      targets_.read(start + begin, start + end, classes_.data() + row * count + begin - first);
    }
    return std::any_of(classes_.begin(), classes_.end(), [](int32_t c) { return c >= 0; });
  }

  // Fills pixels_ for kLanes cells, and adds the part of the gradients that does not depend on the softmax.
  void set_pixels(int64_t first_row, int64_t first_cell, A* low_grad, A* high_grad) {
    const int64_t width = shape_.width * factor_, stride = shape_.stride<A>(), factor = factor_;
    const A uniform = terms_.uniform, uniform_sum = uniform * static_cast<A>(terms_.weight_sum);
    const A *weights = weights_.data(), *one_hot = terms_.one_hot.data();
    for (int64_t lane = 0; lane < kLanes<A>; ++lane, ++low_grad, ++high_grad) {
      const int64_t first = cell_output(first_cell + lane, 0, factor);
      const int32_t* classes = classes_.data() + lane * factor;
      PixelTerms<A>* pixel = pixels_.data();
      int32_t run =
          -1;  // the current class; neighbours often have the same class, and are then added together
      Corners<A> run_sum, uniform_grad;
      for (int64_t row = 0; row < rows(); ++row, classes += factor * kLanes<A>) {
        const int64_t start = (first_row + row) * width + first;
        const A high_weight = high_weights_[row];
        for (int64_t phase = 0; phase < factor; ++phase, ++pixel) {
          const int32_t label = classes[phase];
          // Ignored pixels do not use 0: if the logarithm is NaN, so are their gradients.
          const A log_sum = label == kOutside ? A(0) : maps_.log_sum_exp[start + phase];
          A factor_of_softmax = 0;
          if (label >= 0) {
            const A scale = maps_.grad != nullptr ? maps_.grad[start + phase] : maps_.scale;
            factor_of_softmax = scale * (one_hot[label] + uniform_sum);
            if (label != run) {
              if (run >= 0) run_sum.add_to(low_grad + run * stride, high_grad + run * stride);
              run_sum = {};
              run = label;
            }
            run_sum.add(-scale * one_hot[label], high_weight, weights[phase]);
            if (uniform != 0) uniform_grad.add(scale * uniform, high_weight, weights[phase]);
          }
          const A after = factor_of_softmax * weights[phase];
          pixel->log_sum.lanes[lane] = log_sum;
          pixel->after.lanes[lane] = after;
          pixel->before.lanes[lane] = factor_of_softmax - after;
        }
      }
      if (run >= 0) run_sum.add_to(low_grad + run * stride, high_grad + run * stride);
      if (uniform != 0) {
        const int64_t plane = shape_.sum_plane() * stride;
        uniform_grad.add_to(low_grad + plane, high_grad + plane);
      }
    }
  }

  RowShape shape_;
  int64_t height_, factor_;
  const ClassTerms<A>& terms_;
  Targets targets_;
  SavedMaps<A> maps_;
  std::vector<A> weights_, high_weights_;
  std::vector<PixelTerms<A>> pixels_;
  std::vector<int32_t> classes_;
};

// Rows of gradients in scratch memory, [classes + 1, stride] each; the last plane is the uniform part.
template <typename A>
class GradientRows {
 public:
  GradientRows(const RowShape& shape, int64_t count)
      : blocks_((shape.channels + 1) * shape.blocks<A>()), rows_(count * blocks_) {}

  A* get(int64_t row) { return rows_[row * blocks_].lanes; }
  void clear(int64_t row) { std::fill_n(rows_.begin() + row * blocks_, blocks_, Block<A>{}); }
  void add(int64_t row, const A* from) {
    A* const to = get(row);
    for (int64_t i = 0; i < blocks_ * kLanes<A>; ++i) to[i] += from[i];
  }

 private:
  int64_t blocks_;
  std::vector<Block<A>> rows_;
};

template <typename T>
void add_gradients(const Tensor& logits, Tensor& logits_grad, int64_t factor,
                   const ClassTerms<accumulate_t<T>>& terms, const Targets& targets,
                   const SavedMaps<accumulate_t<T>>& maps) {
  using A = accumulate_t<T>;
  const int64_t images = logits.size(0), height = logits.size(2);
  const RowShape shape{logits.size(1), logits.size(3)};
  const Bands bands(height);
  const int64_t borders = bands.count() - 1;  // in each image
  // Contributions of the bands above and below a border to the input row there.
  GradientRows<A> above(shape, images * borders), below(shape, images * borders);
  const T* data = logits.const_data_ptr<T>();
  T* const grad_data = logits_grad.mutable_data_ptr<T>();
  const auto store = [&](int64_t image, int64_t y, A* row) {
    const auto layout = image_layout<T>(grad_data, logits_grad, image);
    store_gradient_row<T, A>(row, shape, terms.weight.data(), terms.uniform != 0, layout, y);
  };
  parallel_in_chunks(images * bands.count(), 1, [&] {
    return [&, worker = GradientRow<A>(shape, height, factor, terms, targets, maps),
            rows = LogitRows<T>(shape), own = GradientRows<A>(shape, 2)](int64_t task, int64_t) mutable {
      const int64_t image = task / bands.count(), band = task % bands.count();
      const Range cells = bands.cells(band);
      rows.open(image_layout<const T>(data, logits, image), terms);
      // Input y is between the cells y and y + 1.
      const auto is_own = [&](int64_t y) { return y >= cells.begin && y + 1 < cells.end; };
      const auto gradient = [&](int64_t y) {
        if (is_own(y)) return own.get(y % 2);
        return y < cells.begin ? below.get(image * borders + band - 1) : above.get(image * borders + band);
      };
      own.clear(0);
      own.clear(1);
      for (int64_t cell = cells.begin; cell < cells.end; ++cell) {
        const CellRows pair = cell_rows(cell, height);
        const A *low = rows.get(pair.low), *high = rows.get(pair.high);
        A* const low_grad = gradient(pair.low);
        worker.run(image, cell, low, high, pair.high_counts, low_grad,
                   pair.high_counts ? gradient(pair.high) : low_grad);
        if (cell > 0 && is_own(cell - 1)) {
          store(image, cell - 1, low_grad);
          own.clear((cell - 1) % 2);
        }
      }
    };
  });
  torch::stable::parallel_for(0, images * borders, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      above.add(i, below.get(i));
      store(i / borders, bands.cells(i % borders).end - 1, above.get(i));
    }
  });
}

Tensor upsample_cross_entropy_backward(const Tensor& grad_in, const Tensor& logits_in,
                                       const Tensor& target_in, const std::optional<Tensor>& weight,
                                       const Tensor& log_sum_exp_in, const Tensor& total_weight,
                                       int64_t scale_factor, int64_t ignore_index, double label_smoothing,
                                       const std::string& reduction_name) {
  const Reduction reduction = loss_reduction(reduction_name);
  check_upsample_cross_entropy_backward_inputs(grad_in, logits_in, target_in, weight, log_sum_exp_in,
                                               total_weight, scale_factor, reduction);
  const Tensor logits = dense_logits(logits_in), target = torch::stable::contiguous(target_in);
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor log_sum_exp = torch::stable::contiguous(log_sum_exp_in);
  Tensor logits_grad = empty_nchw({logits.size(0), logits.size(1), logits.size(2), logits.size(3)}, logits,
                                  is_channels_last(logits));
  if (logits.numel() == 0) return logits_grad;
  const Targets targets{target.const_data_ptr(), target.scalar_type(), logits.size(1), ignore_index};
  dispatch_floating(logits.scalar_type(), "upsample_cross_entropy_backward", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    const ClassTerms<A> terms(weight, logits.size(1), label_smoothing);
    const A* grads = grad.const_data_ptr<A>();
    SavedMaps<A> maps{log_sum_exp.const_data_ptr<A>(), nullptr, A(0)};
    if (reduction == Reduction::none) {
      maps.grad = grads;
    } else {
      const A total = reduction == Reduction::mean ? *total_weight.const_data_ptr<A>() : A(1);
      maps.scale = total == 0 ? std::numeric_limits<A>::quiet_NaN() : *grads / total;
    }
    add_gradients<T>(logits, logits_grad, scale_factor, terms, targets, maps);
  });
  return logits_grad;
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&upsample_cross_entropy_backward));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

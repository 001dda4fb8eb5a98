#include "ops/upsample_cross_entropy.h"

#include <atomic>
#include <cmath>

#include "ops/cpu/logit_rows.h"
#include "ops/cpu/parallel.h"
#include "ops/cpu/vector_exp.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// The logarithm of the sum of exp over the classes, for P outputs of each of kLanes cells -> `to` [P,
// kLanes].
template <typename A, int P>
PANFPN_ALWAYS_INLINE void log_sum_exp_phases(const A* low, const A* high, A high_weight, const A* weights,
                                             int64_t channels, int64_t stride, A* to) {
  Lanes<A> sum[P] = {};
  const A low_weight = A(1) - high_weight;
  for (int64_t c = 0; c < channels; ++c, low += stride, high += stride) {
    Lanes<A> low_before, low_after, high_before, high_after;
    load_lanes(low, low_before);
    load_lanes(low + 1, low_after);
    load_lanes(high, high_before);
    load_lanes(high + 1, high_after);
    const Lanes<A> before = low_before * low_weight + high_before * high_weight;
    const Lanes<A> after = low_after * low_weight + high_after * high_weight;
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      Lanes<A> exponential;
      exp_lanes<A, false>(before * (A(1) - weights[p]) + after * weights[p], exponential);
      sum[p] += exponential;
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    Lanes<A> log;
    log_lanes<A>(sum[p], log);
    store_lanes(log, to + p * kLanes<A>);
  }
}

// The same for all outputs of the cells in one row of the output -> `to` [factor, kLanes].
template <typename A>
PANFPN_VECTOR_CLONES void log_sum_exp_row(const A* low, const A* high, A high_weight, const A* weights,
                                          int64_t factor, int64_t channels, int64_t stride, A* to) {
  constexpr int L = kLanes<A>;
  int64_t phase = 0;
  for (; phase + 4 <= factor; phase += 4, weights += 4, to += 4 * L) {
    log_sum_exp_phases<A, 4>(low, high, high_weight, weights, channels, stride, to);
  }
  for (; phase + 2 <= factor; phase += 2, weights += 2, to += 2 * L) {
    log_sum_exp_phases<A, 2>(low, high, high_weight, weights, channels, stride, to);
  }
  if (phase < factor) log_sum_exp_phases<A, 1>(low, high, high_weight, weights, channels, stride, to);
}

// The logits of a class in the two inputs of a cell, before and after its outputs.
template <typename A>
struct Pair {
  A before, after;

  A mix(A after_weight) const { return before * (A(1) - after_weight) + after * after_weight; }
};

// A cell in one row of the output.
template <typename A>
struct RowCell {
  const A *low, *high;
  A high_weight;

  Pair<A> mix_rows(int64_t plane_offset) const {
    const A *l = low + plane_offset, *h = high + plane_offset;
    const A low_weight = A(1) - high_weight;
    return {l[0] * low_weight + h[0] * high_weight, l[1] * low_weight + h[1] * high_weight};
  }
};

// The logarithm of a sum of exponentials that may all underflow. This happens between neighbours with
// different largest classes that are far above the others.
template <typename A>
A log_of_small_sum(const RowCell<A>& cell, A after_weight, int64_t channels, int64_t stride) {
  const auto logit = [&](int64_t c) { return cell.mix_rows(c * stride).mix(after_weight); };
  A largest = -std::numeric_limits<A>::infinity(), sum = 0;
  for (int64_t c = 0; c < channels; ++c) largest = std::max(largest, logit(c));
  for (int64_t c = 0; c < channels; ++c) sum += std::exp(logit(c) - largest);
  return largest + std::log(sum);
}

template <typename A>
struct LossMaps {
  A* log_sum_exp;
  A* losses;  // null if only the sum is needed
};

struct LossSums {
  double loss = 0, weight = 0;
};

// The memory that a thread needs for rows of cells.
template <typename A>
class LossRow {
 public:
  LossRow(const RowShape& shape, int64_t height, int64_t factor, const ClassTerms<A>& terms,
          const Targets& targets, const LossMaps<A>& maps)
      : shape_(shape),
        height_(height),
        factor_(factor),
        terms_(terms),
        targets_(targets),
        maps_(maps),
        weights_(phase_weights<A>(factor)),
        log_sums_(factor),
        classes_(factor * kLanes<A>) {}

  // Computes one row of cells of an image from its rows of logits `low` and `high`. Returns whether all
  // targets exist.
  bool run(int64_t image, int64_t cell_y, const A* low, const A* high, bool high_counts, LossSums& sums) {
    bool all_exist = true;
    const Range rows = cell_phases(cell_y, factor_, height_);
    for (int64_t cell = 0; cell < shape_.cells(); cell += kLanes<A>) {
      const int64_t first = cell_output(cell, 0, factor_);
      const int64_t begin = std::max<int64_t>(0, first);
      const int64_t end = std::min(shape_.width * factor_, first + factor_ * kLanes<A>);
      const bool finite = block_is_finite(low, high, cell, shape_);
      for (int64_t phase = rows.begin; phase < rows.end && begin < end; ++phase) {
        const int64_t y = cell_output(cell_y, phase, factor_);
        const int64_t row = (image * height_ * factor_ + y) * shape_.width * factor_;
        all_exist &= targets_.read(row + begin, row + end, classes_.data());
        const auto read_end = classes_.begin() + (end - begin);
        if (finite && std::all_of(classes_.begin(), read_end, [](int32_t c) { return c < 0; })) {
          fill(row + begin, row + end);
          continue;
        }
        const RowCell<A> first_cell{low + cell, high + cell, high_counts ? weights_[phase] : A(0)};
        block_row(first_cell, row, begin, end, first, sums);
      }
    }
    return all_exist;
  }

 private:
  void fill(int64_t begin, int64_t end) {
    std::fill(maps_.log_sum_exp + begin, maps_.log_sum_exp + end, A(0));
    if (maps_.losses != nullptr) std::fill(maps_.losses + begin, maps_.losses + end, A(0));
  }

  void repair_small_sums(const RowCell<A>& first_cell) {
    constexpr int64_t L = kLanes<A>;
    constexpr A kSmall = sizeof(A) == 4 ? A(-69) : A(-620);
    A* const log_sums = log_sums_[0].lanes;
    for (int64_t i = 0; i < factor_ * L; ++i) {
      if (!(log_sums[i] < kSmall)) continue;
      const RowCell<A> cell{first_cell.low + i % L, first_cell.high + i % L, first_cell.high_weight};
      log_sums[i] = log_of_small_sum(cell, weights_[i / L], shape_.channels, shape_.stride<A>());
    }
  }

  // Computes the pixels [begin, end) of a row of the output. `first_cell` is the cell of lane 0 and `first`
  // is the first output of that cell.
  void block_row(const RowCell<A>& first_cell, int64_t row, int64_t begin, int64_t end, int64_t first,
                 LossSums& total) {
    constexpr int L = kLanes<A>;
    const int64_t stride = shape_.stride<A>(), channels = shape_.channels, factor = factor_;
    A* const log_sums = log_sums_[0].lanes;
    log_sum_exp_row<A>(first_cell.low, first_cell.high, first_cell.high_weight, weights_.data(), factor,
                       channels, stride, log_sums);
    repair_small_sums(first_cell);
    const A *weights = weights_.data(), *class_weights = terms_.weight.data(),
            *one_hot = terms_.one_hot.data();
    const int32_t* labels = classes_.data() - begin;
    A *const log_sum_exp = maps_.log_sum_exp + row, *const losses = maps_.losses + row;
    const bool keep_losses = maps_.losses != nullptr;
    LossSums sums;
    int64_t lane = (begin - first) / factor, phase = (begin - first) % factor;
    for (int64_t x = begin; x < end; ++lane, phase = 0) {
      const RowCell<A> cell{first_cell.low + lane, first_cell.high + lane, first_cell.high_weight};
      int32_t mixed = -1;  // the class of `pair`; neighbours often have the same class
      Pair<A> pair{};
      for (; phase < factor && x < end; ++phase, ++x) {
        const A log_sum = log_sums[phase * L + lane];
        log_sum_exp[x] = log_sum;
        const int32_t label = labels[x];
        A loss = 0;
        if (label >= 0) {
          if (label != mixed) pair = cell.mix_rows(label * stride);
          mixed = label;
          loss = one_hot[label] * (log_sum - pair.mix(weights[phase]));
          if (terms_.uniform != 0) {
            const A logits = cell.mix_rows(shape_.sum_plane() * stride).mix(weights[phase]);
            loss += terms_.uniform * (static_cast<A>(terms_.weight_sum) * log_sum - logits);
          }
          sums.loss += static_cast<double>(loss);
          sums.weight += static_cast<double>(class_weights[label]);
        }
        if (keep_losses) losses[x] = loss;
      }
    }
    total.loss += sums.loss;
    total.weight += sums.weight;
  }

  RowShape shape_;
  int64_t height_, factor_;
  const ClassTerms<A>& terms_;
  Targets targets_;
  LossMaps<A> maps_;
  std::vector<A> weights_;
  std::vector<Block<A>> log_sums_;
  std::vector<int32_t> classes_;
};

template <typename T>
LossSums sum_losses(const Tensor& logits, int64_t factor, const ClassTerms<accumulate_t<T>>& terms,
                    const Targets& targets, const LossMaps<accumulate_t<T>>& maps, bool& all_exist) {
  using A = accumulate_t<T>;
  all_exist = true;
  if (logits.numel() == 0) return {};
  const int64_t height = logits.size(2);
  const RowShape shape{logits.size(1), logits.size(3)};
  const Bands bands(height);
  std::vector<LossSums> parts(logits.size(0) * bands.count());
  std::atomic<bool> found_all{true};
  const T* data = logits.const_data_ptr<T>();
  parallel_in_chunks(static_cast<int64_t>(parts.size()), 1, [&] {
    return [&, worker = LossRow<A>(shape, height, factor, terms, targets, maps), rows = LogitRows<T>(shape)](
               int64_t task, int64_t) mutable {
      const int64_t image = task / bands.count();
      const Range cells = bands.cells(task % bands.count());
      rows.open(image_layout<const T>(data, logits, image), terms);
      for (int64_t cell = cells.begin; cell < cells.end; ++cell) {
        const CellRows pair = cell_rows(cell, height);
        const A *low = rows.get(pair.low), *high = rows.get(pair.high);
        if (!worker.run(image, cell, low, high, pair.high_counts, parts[task])) found_all = false;
      }
    };
  });
  all_exist = found_all;
  LossSums total;
  for (const LossSums& part : parts) {
    total.loss += part.loss;
    total.weight += part.weight;
  }
  return total;
}

void refuse_missing_class(const Targets& targets, const Tensor& target) {
  const int64_t width = target.size(2), plane = target.size(1) * width;
  for (int64_t pixel = 0; pixel < target.numel(); ++pixel) {
    const int64_t value = targets.value(pixel);
    STD_TORCH_CHECK(value == targets.ignore_index || (value >= 0 && value < targets.channels),
                    "target: expected classes from 0 to ", targets.channels - 1, " or ignore_index ",
                    targets.ignore_index, ", got ", value, " at [", pixel / plane, ", ",
                    pixel % plane / width, ", ", pixel % width, "]");
  }
}

std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy(const Tensor& logits_in, const Tensor& target_in,
                                                          const std::optional<Tensor>& weight,
                                                          int64_t scale_factor, int64_t ignore_index,
                                                          double label_smoothing,
                                                          const std::string& reduction_name) {
  check_upsample_cross_entropy_inputs(logits_in, target_in, weight, scale_factor);
  const Reduction reduction = loss_reduction(reduction_name);
  const Tensor logits = dense_logits(logits_in), target = torch::stable::contiguous(target_in);
  const ScalarType dtype = loss_dtype(logits);
  const auto map = [&] { return empty({target.size(0), target.size(1), target.size(2)}, dtype, logits); };
  Tensor log_sum_exp = map(), total_weight = empty({}, dtype, logits);
  Tensor loss = reduction == Reduction::none ? map() : empty({}, dtype, logits);
  const Targets targets{target.const_data_ptr(), target.scalar_type(), logits.size(1), ignore_index};
  dispatch_floating(logits.scalar_type(), "upsample_cross_entropy", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    const ClassTerms<A> terms(weight, logits.size(1), label_smoothing);
    A* const loss_data = loss.mutable_data_ptr<A>();
    const LossMaps<A> maps{log_sum_exp.mutable_data_ptr<A>(),
                           reduction == Reduction::none ? loss_data : nullptr};
    bool all_exist;
    const LossSums total = sum_losses<T>(logits, scale_factor, terms, targets, maps, all_exist);
    if (!all_exist) refuse_missing_class(targets, target);
    *total_weight.mutable_data_ptr<A>() = static_cast<A>(total.weight);
    if (reduction == Reduction::sum) *loss_data = static_cast<A>(total.loss);
    // PyTorch divides the smoothed part separately, and then gets 0 / 0 in the other part.
    if (reduction == Reduction::mean) {
      *loss_data =
          total.weight == 0 ? std::numeric_limits<A>::quiet_NaN() : static_cast<A>(total.loss / total.weight);
    }
  });
  return {loss, log_sum_exp, total_weight};
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&upsample_cross_entropy));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// The output is labelled in tiles. A tile reads a few rows of the input, which stay in the cache.
//
// A pixel is a weighted mean of the inputs that it reads. If one class has the largest logit in all of these,
// it also has the largest in the mean, and nothing needs to be computed. In a segmentation this holds for
// most pixels.
#include "ops/upsample_argmax.h"

#include <vector>

#include "ops/cpu/class_lanes.h"
#include "ops/cpu/parallel.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// Used instead of a label where the inputs have different labels.
constexpr int16_t kUndecided = -1;

// Adjacent pixels of the output that read the same columns of the input. Both are counted from the first of
// the strip.
struct Run {
  int64_t begin, end;
  int64_t column;
  int taps;
};

// The columns [begin, end) of the output, and the columns of the input that they read.
template <typename A>
struct Strip {
  int64_t begin, end;
  int64_t first_column, columns = 0;
  int most_taps = 0;
  std::vector<Run> runs;
  std::vector<PixelTap<A>> pixels;
};

// Divides the output into strips such that four rows of a strip fit into the cache.
template <typename A>
std::vector<Strip<A>> cut_strips(const std::vector<ComposedTap<A>>& taps, int64_t blocks) {
  constexpr int64_t kCacheBytes = 256 << 10, kLeast = 16;
  const int64_t width = static_cast<int64_t>(taps.size());
  const int64_t reach = taps.back().base - taps.front().base + 1;
  const int64_t most = std::max<int64_t>(kLeast, kCacheBytes / (4 * blocks * sizeof(Block<A>)));
  const int64_t count = std::min((reach + most - 1) / most, width);
  std::vector<Strip<A>> strips(count);
  for (int64_t s = 0; s < count; ++s) {
    Strip<A>& strip = strips[s];
    strip.begin = width * s / count;
    strip.end = width * (s + 1) / count;
    strip.first_column = taps[strip.begin].base;
    for (int64_t x = 0; x < strip.end - strip.begin; ++x) {
      const ComposedTap<A>& tap = taps[strip.begin + x];
      const int64_t column = tap.base - strip.first_column;
      strip.columns = std::max(strip.columns, column + tap.taps);
      strip.most_taps = std::max(strip.most_taps, tap.taps);
      if (strip.runs.empty() || strip.runs.back().column != column || strip.runs.back().taps != tap.taps) {
        strip.runs.push_back({x, x, column, tap.taps});
      }
      strip.runs.back().end = x + 1;
      strip.pixels.push_back(
          {static_cast<int32_t>(column * blocks), tap.taps, {tap.weight[0], tap.weight[1], tap.weight[2]}});
    }
  }
  return strips;
}

// Shared by all tiles.
template <typename A, typename Label>
struct Plan {
  std::vector<ComposedTap<A>> rows;
  std::vector<Strip<A>> strips;
  int64_t widest = 0;  // number of input columns in the widest strip
  int64_t channels, blocks, height, width;
  Label* labels;
  float* probabilities;  // or null
};

// Labels tiles one after the other; each thread has its own labeller.
template <typename T, typename Label>
class Labeller {
  using A = accumulate_t<T>;

 public:
  explicit Labeller(const Plan<A, Label>& plan)
      : plan_(plan),
        // Rows are loaded in whole vectors, and the last columns are read with up to two extra taps.
        mixed_(((plan.widest + kLanes<A> - 1) / kLanes<A> * kLanes<A> + 2) * plan.blocks),
        agreed_(plan.widest) {
    for (InputRow& row : ring_) {
      row.numbers.resize(mixed_.size());
      row.label.resize(plan.widest + kAtOnce);
    }
    for (int64_t x = 0; x < plan.widest + kAtOnce; ++x) {
      const int64_t column = std::min(x, plan.widest - 1);
      identity_taps_.push_back({static_cast<int32_t>(column * plan.blocks), 1, {A(1), A(0), A(0)}});
      ascending_.push_back(static_cast<int32_t>(x));
    }
  }

  // Labels the rows [begin, end) of a strip.
  void label_tile(const LogitMap<T>& map, int64_t image, const Strip<A>& strip, int64_t begin, int64_t end) {
    for (InputRow& row : ring_) row.position = -1;
    // The extra columns have no weight, but they must be finite.
    Block<A>* rest = mixed_.data() + strip.columns * plan_.blocks;
    std::fill(rest, rest + 2 * plan_.blocks, Block<A>{});
    for (int64_t y = begin; y < end;) {
      const ComposedTap<A>& tap = plan_.rows[y];
      bool finite = true;
      for (int k = 0; k < tap.taps; ++k) {
        const InputRow& row = input_row(map, strip, tap.base + k);
        rows_[k] = row.numbers.data();
        finite &= row.finite;
      }
      int64_t same_end = y + 1;
      while (same_end < end && plan_.rows[same_end].base == tap.base && plan_.rows[same_end].taps == tap.taps)
        ++same_end;
      label_rows(image, y, same_end, strip, finite);
      y = same_end;
    }
  }

 private:
  // A row of the input, within the current strip.
  struct InputRow {
    int64_t position = -1;
    bool finite = true;
    std::vector<Block<A>> numbers;
    std::vector<int16_t> label;  // set if the row is finite and no probabilities are needed
  };

  bool wants_probabilities() const { return plan_.probabilities != nullptr; }

  const InputRow& input_row(const LogitMap<T>& map, const Strip<A>& strip, int64_t position) {
    InputRow& row = ring_[position % 3];
    if (row.position == position) return row;
    row.position = position;
    row.finite = load_classes<T, A>(map, position, strip.first_column, strip.columns, row.numbers.data());
    if (!row.finite || wants_probabilities()) return row;
    const ClassLine<A> line{row.numbers.data(), plan_.blocks, plan_.channels, identity_taps_.data()};
    for (int64_t x = 0; x < strip.columns; x += kBatch) {
      label_pixels<A, int16_t>(line, 1, ascending_.data() + x, std::min<int64_t>(kBatch, strip.columns - x),
                               row.label.data(), largest_);
    }
    return row;
  }

  // Finds the label of each column that is the same in all rows that an output row reads.
  void find_agreement(const ComposedTap<A>& tap, int64_t columns) {
    const int16_t* first = ring_[tap.base % 3].label.data();
    std::copy(first, first + columns, agreed_.begin());
    for (int k = 1; k < tap.taps; ++k) {
      const int16_t* label = ring_[(tap.base + k) % 3].label.data();
      for (int64_t x = 0; x < columns; ++x) agreed_[x] = agreed_[x] == label[x] ? agreed_[x] : kUndecided;
    }
  }

  int16_t agreement(const Run& run) const {
    const int16_t* label = agreed_.data() + run.column;
    for (int k = 1; k < run.taps; ++k) {
      if (label[k] != label[0]) return kUndecided;
    }
    return label[0];
  }

  // Labels the rows [begin, end), which read the same rows of the input.
  void label_rows(int64_t image, int64_t begin, int64_t end, const Strip<A>& strip, bool finite) {
    const bool may_agree = finite && !wants_probabilities();
    if (may_agree) find_agreement(plan_.rows[begin], strip.columns);
    const auto offset = [&](int64_t y) { return (image * plan_.height + y) * plan_.width + strip.begin; };
    const auto paint = [&](int64_t first, int64_t last, int16_t label) {
      for (int64_t y = begin; y < end; ++y) {
        Label* row = plan_.labels + offset(y);
        std::fill(row + first, row + last, static_cast<Label>(label));
      }
    };
    const auto compute = [&] {
      std::fill(pending_ + count_, pending_ + count_ + kAtOnce, pending_[count_ - 1]);
      for (int64_t y = begin; y < end; ++y) compute_pending(strip, y, offset(y), finite);
      count_ = 0;
      ranges_.clear();
    };
    int64_t painted_begin = 0, painted_end = 0;
    int16_t label = kUndecided;
    for (const Run& run : strip.runs) {
      const int16_t of_run = may_agree ? agreement(run) : kUndecided;
      if (of_run != kUndecided) {
        if (of_run != label || run.begin != painted_end) {
          paint(painted_begin, painted_end, label);
          painted_begin = run.begin;
          label = of_run;
        }
        painted_end = run.end;
        continue;
      }
      for (int64_t x = run.begin; x < run.end;) {
        add_range(run.column, std::min(run.column + strip.most_taps, strip.columns));
        const int64_t some = std::min(run.end - x, kBatch - count_);
        for (int64_t i = 0; i < some; ++i) pending_[count_ + i] = static_cast<int32_t>(x + i);
        x += some;
        count_ += some;
        if (count_ == kBatch) compute();
      }
    }
    paint(painted_begin, painted_end, label);
    if (count_ > 0) compute();
  }

  void add_range(int64_t begin, int64_t end) {
    if (!ranges_.empty() && ranges_.back().end >= begin) {
      ranges_.back().end = end;
    } else {
      ranges_.push_back({begin, end});
    }
  }

  void compute_pending(const Strip<A>& strip, int64_t y, int64_t offset, bool finite) {
    mix_rows<A>(rows_, plan_.rows[y], ranges_.data(), static_cast<int64_t>(ranges_.size()), plan_.blocks,
                mixed_.data());
    const ClassLine<A> line{mixed_.data(), plan_.blocks, plan_.channels, strip.pixels.data()};
    if (finite) {
      label_pixels<A, Label>(line, strip.most_taps, pending_, count_, plan_.labels + offset, largest_);
    } else {
      label_any_pixels<A, Label>(line, pending_, count_, plan_.labels + offset, largest_);
    }
    if (wants_probabilities()) {
      top_probabilities<A>(line, pending_, count_, largest_, plan_.probabilities + offset);
    }
  }

  const Plan<A, Label>& plan_;
  InputRow ring_[3];
  const Block<A>* rows_[3] = {};
  std::vector<Block<A>> mixed_;
  std::vector<int16_t> agreed_;
  std::vector<PixelTap<A>> identity_taps_;  // taps for labelling the columns of the input themselves
  std::vector<int32_t> ascending_;          // 0, 1, 2, ...
  int32_t pending_[kBatch + kAtOnce];       // pixels that must be computed
  int64_t count_ = 0;
  std::vector<Range> ranges_;  // columns that these pixels read
  A largest_[kBatch + kAtOnce];
};

struct Resampling {
  int64_t scale_factor, crop_height, crop_width, height, width;
};

template <typename A>
std::vector<ComposedTap<A>> composed_taps(int64_t size, int64_t crop, int64_t factor, int64_t input_size) {
  std::vector<ComposedTap<A>> taps(size);
  for (int64_t i = 0; i < size; ++i) taps[i] = composed_tap<A>(i, size, crop, factor, input_size);
  return taps;
}

template <typename A, typename Label>
Plan<A, Label> make_plan(const Tensor& logits, const Resampling& to, Tensor& labels, Tensor& probabilities) {
  Plan<A, Label> plan;
  plan.channels = logits.size(1);
  plan.blocks = (plan.channels + kLanes<A> - 1) / kLanes<A>;
  plan.height = to.height;
  plan.width = to.width;
  plan.rows = composed_taps<A>(to.height, to.crop_height, to.scale_factor, logits.size(2));
  plan.strips =
      cut_strips<A>(composed_taps<A>(to.width, to.crop_width, to.scale_factor, logits.size(3)), plan.blocks);
  for (const auto& strip : plan.strips) plan.widest = std::max(plan.widest, strip.columns);
  plan.labels = labels.mutable_data_ptr<Label>();
  plan.probabilities = probabilities.numel() > 0 ? probabilities.mutable_data_ptr<float>() : nullptr;
  return plan;
}

template <typename T, typename Label>
void label_maps(const Tensor& logits, const Plan<accumulate_t<T>, Label>& plan) {
  const int64_t images = logits.size(0), height = logits.size(2), width = logits.size(3);
  const int64_t channels = plan.channels, plane = height * width;
  const T* data = logits.const_data_ptr<T>();
  const bool channels_last = is_channels_last(logits);
  const int64_t pixel_stride = channels_last ? channels : 1;
  const LogitMap<T> map{data,
                        data + images * channels * plane,
                        channels,
                        channels_last ? 1 : plane,
                        width * pixel_stride,
                        pixel_stride};
  // A tile reads two more rows of the input than its share, so it should not be too low; but every thread
  // should get tiles.
  constexpr int64_t kInputRows = 16, kLeastInputRows = 4, kTilesPerThread = 4;
  const int64_t reach = plan.rows.back().base - plan.rows.front().base + 1;
  const int64_t strips = static_cast<int64_t>(plan.strips.size());
  const int64_t wanted = kTilesPerThread * torch::stable::get_num_threads();
  const int64_t input_rows = std::clamp(reach * images * strips / wanted, kLeastInputRows, kInputRows);
  const int64_t bands = std::min((reach + input_rows - 1) / input_rows, plan.height);
  parallel_in_chunks(images * strips * bands, 1, [&] {
    return [&, labeller = Labeller<T, Label>(plan)](int64_t task, int64_t) mutable {
      const int64_t band = task % bands, strip = task / bands % strips, image = task / bands / strips;
      LogitMap<T> of_image = map;
      of_image.data += image * channels * plane;
      labeller.label_tile(of_image, image, plan.strips[strip], plan.height * band / bands,
                          plan.height * (band + 1) / bands);
    };
  });
}

std::tuple<Tensor, Tensor> upsample_argmax(const Tensor& logits_in, int64_t scale_factor, int64_t crop_height,
                                           int64_t crop_width, int64_t height, int64_t width,
                                           bool return_prob) {
  check_upsample_argmax_inputs(logits_in, scale_factor, crop_height, crop_width, height, width);
  const Tensor logits = is_channels_last(logits_in) ? logits_in : torch::stable::contiguous(logits_in);
  const int64_t images = logits.size(0);
  const bool bytes = logits.size(1) <= 256;
  Tensor labels = empty({images, height, width}, bytes ? ScalarType::Byte : ScalarType::Short, logits);
  Tensor probabilities = return_prob ? empty({images, height, width}, ScalarType::Float, logits)
                                     : empty({0}, ScalarType::Float, logits);
  if (labels.numel() == 0) return {labels, probabilities};
  const Resampling to{scale_factor, crop_height, crop_width, height, width};
  dispatch_floating(logits.scalar_type(), "upsample_argmax", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (bytes) {
      label_maps<T>(logits, make_plan<accumulate_t<T>, uint8_t>(logits, to, labels, probabilities));
    } else {
      label_maps<T>(logits, make_plan<accumulate_t<T>, int16_t>(logits, to, labels, probabilities));
    }
  });
  return {labels, probabilities};
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// A tile of pixels is normalised into the L1 cache and multiplied from there, so that the activations are
// never written to memory.
#include "ops/group_norm_relu_project.h"

#include "ops/cpu/channel_affine.h"
#include "ops/cpu/channel_block.h"
#include "ops/cpu/matrix.h"
#include "ops/cpu/pages.h"
#include "ops/upsample.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// The matrix [K, C] and its bias in the layout of `multiply`.
template <typename A>
struct Predictor {
  PanelLayout layout;
  Scratch<A> panels;
  std::vector<A> bias;

  Predictor(const std::vector<A>& matrix, const std::vector<A>& matrix_bias, int64_t channels)
      : layout{static_cast<int64_t>(matrix_bias.size()), channels, kLanes<A>},
        panels(make_scratch<A>(layout.size())),
        bias(matrix_bias) {
    bias.resize(layout.padded());
    std::fill(panels.get(), panels.get() + layout.size(), A(0));
    for (int64_t k = 0; k < layout.outputs; ++k) {
      for (int64_t c = 0; c < channels; ++c) panels[layout.index(k, c)] = matrix[k * channels + c];
    }
  }
};

// Computes `channels` channels of the activations of some pixels, which are `stride` apart in `from` and
// `to_stride` apart in `to`.
template <typename T, typename A>
PANFPN_VECTOR_CLONES void activate_pixels(const T* from, int64_t stride, int64_t channels, int64_t pixels,
                                          const A* scale, const A* shift, A* to, int64_t to_stride) {
  constexpr int L = kLanes<A>;
  for (int64_t p = 0; p < pixels; ++p, from += stride, to += to_stride) {
    for (int64_t c = 0; c < channels; c += L) {
      Lanes<A> lanes, scales, shifts;
      if (c + L <= channels) {
        load_lanes(from + c, lanes);
      } else {
        load_some<T, A>(from + c, channels - c, lanes);
      }
      load_lanes(scale + c, scales);
      load_lanes(shift + c, shifts);
      normalise_relu<A>(lanes, scales, shifts, lanes);
      store_lanes(lanes, to + c);
    }
  }
}

// The sum added to one pixel's logits: up to four pixels of the residual, and their weights.
template <typename T, typename A>
struct Addend {
  const T* pixels[4];
  A weights[4];
};

template <typename T, typename A, int Count>
PANFPN_ALWAYS_INLINE void add_lanes(const Addend<T, A>& addend, int64_t offset, Lanes<A>& sum) {
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
    Lanes<A> lanes;
    load_lanes(addend.pixels[i] + offset, lanes);
    sum += lanes * addend.weights[i];
  }
}

// product [pixels, padded outputs] + addends -> `to` [pixels, outputs].
template <typename T, typename A, int Count>
PANFPN_VECTOR_CLONES void add_and_store(const A* product, int64_t padded, const Addend<T, A>* addends,
                                        int64_t outputs, int64_t pixels, T* to) {
  constexpr int L = kLanes<A>;
  for (int64_t p = 0; p < pixels; ++p) {
    const A* const row = product + p * padded;
    T* const out = to + p * outputs;
    Lanes<A> sum;
    if (outputs < L) {
      load_lanes(row, sum);
      for (int i = 0; i < Count; ++i) {
        Lanes<A> lanes;
        load_some<T, A>(addends[p].pixels[i], outputs, lanes);
        sum += lanes * addends[p].weights[i];
      }
      store_some<T, A>(sum, outputs, out);
      continue;
    }
    for (int64_t k = 0; k < outputs; k += L) {
      const int64_t begin = std::min<int64_t>(k, outputs - L);  // the last vector overlaps the one before
      load_lanes(row + begin, sum);
      add_lanes<T, A, Count>(addends[p], begin, sum);
      store_lanes(sum, out + begin);
    }
  }
}

// The pixels of the residual that are added to a row of the output.
template <typename T, typename A>
struct ResidualRow {
  const T *low, *high;  // rows of the residual
  A high_weight;
  int64_t width;  // width of the residual
  bool half;

  Addend<T, A> at(int64_t x, int64_t outputs) const {
    if (!half) return {{low + x * outputs}, {A(1)}};
    const UpsampleTap<A> tap = upsample_tap<A>(x, 2, width);
    return {{low + tap.low * outputs, low + tap.high * outputs, high + tap.low * outputs,
             high + tap.high * outputs},
            {(1 - high_weight) * (1 - tap.high_weight), (1 - high_weight) * tap.high_weight,
             high_weight * (1 - tap.high_weight), high_weight * tap.high_weight}};
  }
};

// A feature map in memory, dense in either layout.
template <typename T>
struct Map {
  const T* data;
  int64_t channels, height, width;
  bool channels_last;
};

// Activations [pixels, padded channels] of consecutive pixels of a row. `block` is scratch of [pixels,
// kLanes].
template <typename T, typename A>
void activate(const Map<T>& map, const ChannelAffine<A>& affine, int64_t image, int64_t y, int64_t x,
              int64_t pixels, A* block, A* to) {
  constexpr int L = kLanes<A>;
  const int64_t plane = map.height * map.width, pixel = y * map.width + x;
  const T* const data = map.data + image * map.channels * plane;
  const A* const scale = affine.scale.data() + image * affine.padded;
  const A* const shift = affine.shift.data() + image * affine.padded;
  if (map.channels_last) {
    activate_pixels<T, A>(data + pixel * map.channels, map.channels, map.channels, pixels, scale, shift, to,
                          affine.padded);
    return;
  }
  for (int64_t c = 0; c < map.channels; c += L) {
    const int64_t some = std::min<int64_t>(L, map.channels - c);
    planes_to_block<T, A>(data + c * plane + pixel, plane, some, pixels, block);
    activate_pixels<A, A>(block, L, L, pixels, scale + c, shift + c, to + c, affine.padded);
  }
}

template <typename T>
void project(const Map<T>& map, const ChannelAffine<accumulate_t<T>>& affine,
             const Predictor<accumulate_t<T>>& predictor, const T* residual, int64_t residual_height,
             int64_t residual_width, int64_t batch, T* out) {
  using A = accumulate_t<T>;
  const int64_t height = map.height, width = map.width, outputs = predictor.layout.outputs,
                padded = predictor.layout.padded();
  const bool half = residual_height != height;
  torch::stable::parallel_for(0, batch * height, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> activations = make_scratch<A>(kPixelTile * affine.padded);
    const Scratch<A> block = make_scratch<A>(kPixelTile * kLanes<A>),
                     product = make_scratch<A>(kPixelTile * padded);
    // The unused rows of a partial tile are multiplied too.
    std::fill(activations.get(), activations.get() + kPixelTile * affine.padded, A(0));
    Addend<T, A> addends[kPixelTile];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / height, y = row % height;
      ResidualRow<T, A> added{};
      if (residual != nullptr) {
        const UpsampleTap<A> tap = half ? upsample_tap<A>(y, 2, residual_height) : UpsampleTap<A>{y, y, A(0)};
        const int64_t first = image * residual_height, size = residual_width * outputs;
        added = {residual + (first + tap.low) * size, residual + (first + tap.high) * size, tap.high_weight,
                 residual_width, half};
      }
      for (int64_t x = 0; x < width; x += kPixelTile) {
        const int64_t pixels = std::min(kPixelTile, width - x);
        activate<T, A>(map, affine, image, y, x, pixels, block.get(), activations.get());
        multiply<A>(activations.get(), affine.padded, pixels, predictor.layout, predictor.panels.get(),
                    predictor.bias.data(), product.get(), padded);
        for (int64_t p = 0; residual != nullptr && p < pixels; ++p) addends[p] = added.at(x + p, outputs);
        const auto store = residual == nullptr ? add_and_store<T, A, 0>
                           : half              ? add_and_store<T, A, 4>
                                               : add_and_store<T, A, 1>;
        store(product.get(), padded, addends, outputs, pixels, out + (row * width + x) * outputs);
      }
    }
  });
}

Tensor group_norm_relu_project(const Tensor& input, const Tensor& mean, const Tensor& rstd,
                               const Tensor& weight, const Tensor& bias, const Tensor& proj_weight,
                               std::optional<Tensor> proj_bias, std::optional<Tensor> residual) {
  const char* op = "group_norm_relu_project";
  check_group_norm_relu_project_inputs(input, mean, rstd, weight, bias, proj_weight, proj_bias, residual);
  const int64_t batch = input.size(0), channels = input.size(1), height = input.size(2),
                width = input.size(3);
  const int64_t outputs = proj_weight.size(0);
  Tensor out = empty_nchw({batch, outputs, height, width}, input, true);
  if (out.numel() == 0) return out;
  dispatch_floating(input.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    const ChannelAffine<A> affine(mean, rstd, weight, bias, op);
    const Predictor<A> predictor(
        read_values<A>(proj_weight, op),
        proj_bias.has_value() ? read_values<A>(*proj_bias, op) : std::vector<A>(outputs), channels);
    const bool as_pixels = is_channels_last(input);
    const Tensor dense = as_pixels ? input : torch::stable::contiguous(input);
    const Map<T> map{dense.const_data_ptr<T>(), channels, height, width, as_pixels};
    T* const data = out.mutable_data_ptr<T>();
    advise_huge_pages(data, out.numel() * static_cast<int64_t>(sizeof(T)));
    if (residual.has_value()) {
      const Tensor added = channels_last(*residual);
      project<T>(map, affine, predictor, added.const_data_ptr<T>(), added.size(2), added.size(3), batch,
                 data);
    } else {
      project<T>(map, affine, predictor, nullptr, 0, 0, batch, data);
    }
  });
  return out;
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("group_norm_relu_project", TORCH_BOX(&group_norm_relu_project));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

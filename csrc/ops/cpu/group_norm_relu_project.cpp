// A tile of pixels is normalised into the first cache and multiplied from there, so that the activations
// never reach memory. The product is a block of registers, pixels x outputs, over all channels: that is bound
// by multiply-adds, which this file therefore lets the compiler fuse (CMakeLists.txt).
#include "ops/group_norm_relu_project.h"

#include <memory>
#include <new>

#include "ops/cpu/channel_affine.h"
#include "ops/cpu/channel_block.h"
#include "ops/upsample.h"

namespace panfpn {
namespace {

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

// Uninitialised numbers from the start of a cache line on.
template <typename A>
using Scratch = std::unique_ptr<A[], FreeAligned>;

template <typename A>
Scratch<A> make_scratch(int64_t count) {
  return Scratch<A>(
      static_cast<A*>(::operator new(static_cast<size_t>(count) * sizeof(A), std::align_val_t(64))));
}

// Divisible by the pixels of each block of registers.
constexpr int64_t kTile = 24;

// Registers of outputs in a block: with 32 registers of 64 bytes, 24 of them hold 6 pixels x 4, 12 x 2 or 24
// x 1; narrower vectors take several registers for each of ours, so there 6 x 1.
inline bool has_wide_registers() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool wide = __builtin_cpu_supports("avx512f");
  return wide;
#else
  return false;
#endif
}

// The matrix [K, C] as blocks of outputs, each [C, vectors * kLanes] and padded with zeros; beside it the
// bias.
template <typename A>
struct PackedMatrix {
  int64_t channels, outputs;
  bool wide;
  Scratch<A> weights, bias;

  PackedMatrix(const std::vector<A>& matrix, const std::vector<A>& matrix_bias, int64_t channels)
      : channels(channels),
        outputs(static_cast<int64_t>(matrix_bias.size())),
        wide(has_wide_registers()),
        weights(make_scratch<A>(channels * padded())),
        bias(make_scratch<A>(padded())) {
    constexpr int L = kLanes<A>;
    std::fill(weights.get(), weights.get() + channels * padded(), A(0));
    std::fill(bias.get(), bias.get() + padded(), A(0));
    std::copy(matrix_bias.begin(), matrix_bias.end(), bias.get());
    for (int64_t first = 0; first < padded();) {
      const int64_t size = vectors(first) * L;
      A* const block = weights.get() + first * channels;
      for (int64_t k = first; k < std::min(first + size, outputs); ++k) {
        for (int64_t c = 0; c < channels; ++c) block[c * size + k - first] = matrix[k * channels + c];
      }
      first += size;
    }
  }

  int64_t padded() const { return (outputs + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }
  // Of the block that begins at output `first`.
  int64_t vectors(int64_t first) const {
    const int64_t left = (padded() - first) / kLanes<A>;
    return wide ? (left >= 4 ? 4 : left) : 1;
  }
};

// [P, V registers] = activations [P, channels] x weights [channels, V registers] + bias. Pixels of the two
// lie `stride` and `to_stride` apart.
template <typename A, int P, int V>
PANFPN_ALWAYS_INLINE void multiply_block(const A* activations, int64_t stride, const A* weights,
                                         const A* bias, int64_t channels, A* to, int64_t to_stride) {
  constexpr int L = kLanes<A>;
  Lanes<A> sum[P][V];
#pragma GCC unroll 24
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) load_lanes(bias + v * L, sum[p][v]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    Lanes<A> weight[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) load_lanes(weights + (c * V + v) * L, weight[v]);
#pragma GCC unroll 24
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[p][v] += weight[v] * activations[p * stride + c];
    }
  }
#pragma GCC unroll 24
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_lanes(sum[p][v], to + p * to_stride + v * L);
  }
}

template <typename A, int P, int V>
PANFPN_VECTOR_CLONES void multiply_tile(const A* activations, int64_t stride, const A* weights, const A* bias,
                                        int64_t channels, int64_t pixels, A* to, int64_t to_stride) {
  for (int64_t p = 0; p < pixels; p += P) {
    multiply_block<A, P, V>(activations + p * stride, stride, weights, bias, channels, to + p * to_stride,
                            to_stride);
  }
}

// activations [kTile, padded channels], of which `pixels` count -> product [kTile, padded outputs].
template <typename A>
void multiply(const A* activations, int64_t pixels, const PackedMatrix<A>& matrix, A* product) {
  const int64_t stride = padded_channels<A>(matrix.channels), padded = matrix.padded();
  for (int64_t first = 0; first < padded;) {
    const int64_t vectors = matrix.vectors(first);
    const auto tile = !matrix.wide   ? multiply_tile<A, 6, 1>
                      : vectors == 4 ? multiply_tile<A, 6, 4>
                      : vectors == 3 ? multiply_tile<A, 8, 3>
                      : vectors == 2 ? multiply_tile<A, 12, 2>
                                     : multiply_tile<A, 24, 1>;
    tile(activations, stride, matrix.weights.get() + first * matrix.channels, matrix.bias.get() + first,
         matrix.channels, pixels, product + first, padded);
    first += vectors * kLanes<A>;
  }
}

// Activations of `channels` channels of some pixels, which lie `stride` apart, and `to_stride` in `to`.
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

// What is added to one pixel's logits: the weighted mean of `count` pixels of the residual.
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

// product [pixels, padded outputs] + addends -> to [pixels, outputs].
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
      const int64_t begin = std::min<int64_t>(k, outputs - L);  // the last outputs overlap those before
      load_lanes(row + begin, sum);
      add_lanes<T, A, Count>(addends[p], begin, sum);
      store_lanes(sum, out + begin);
    }
  }
}

// The residual's pixels that a row of the output adds up.
template <typename T, typename A>
struct ResidualRow {
  const T *low, *high;  // rows of the residual
  A high_weight;
  int64_t width;  // of the residual
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

// A feature map as it lies in memory, dense in either layout.
template <typename T>
struct Map {
  const T* data;
  int64_t channels, height, width;
  bool channels_last;
};

// Activations [pixels, padded channels] of pixels that follow each other in a row. `block` is scratch of
// [pixels, kLanes].
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
             const PackedMatrix<accumulate_t<T>>& matrix, const T* residual, int64_t residual_height,
             int64_t residual_width, int64_t batch, T* out) {
  using A = accumulate_t<T>;
  const int64_t height = map.height, width = map.width, outputs = matrix.outputs, padded = matrix.padded();
  const bool half = residual_height != height;
  torch::stable::parallel_for(0, batch * height, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> activations = make_scratch<A>(kTile * affine.padded);
    const Scratch<A> block = make_scratch<A>(kTile * kLanes<A>), product = make_scratch<A>(kTile * padded);
    // A tile that is not full is multiplied whole.
    std::fill(activations.get(), activations.get() + kTile * affine.padded, A(0));
    Addend<T, A> addends[kTile];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / height, y = row % height;
      ResidualRow<T, A> added{};
      if (residual != nullptr) {
        const UpsampleTap<A> tap = half ? upsample_tap<A>(y, 2, residual_height) : UpsampleTap<A>{y, y, A(0)};
        const int64_t first = image * residual_height, size = residual_width * outputs;
        added = {residual + (first + tap.low) * size, residual + (first + tap.high) * size, tap.high_weight,
                 residual_width, half};
      }
      for (int64_t x = 0; x < width; x += kTile) {
        const int64_t pixels = std::min(kTile, width - x);
        activate<T, A>(map, affine, image, y, x, pixels, block.get(), activations.get());
        multiply<A>(activations.get(), pixels, matrix, product.get());
        for (int64_t p = 0; residual != nullptr && p < pixels; ++p) addends[p] = added.at(x + p, outputs);
        const auto store = residual == nullptr ? add_and_store<T, A, 0>
                           : half              ? add_and_store<T, A, 4>
                                               : add_and_store<T, A, 1>;
        store(product.get(), padded, addends, outputs, pixels, out + (row * width + x) * outputs);
      }
    }
  });
}

// The same values, channels-last.
Tensor to_channels_last(const Tensor& t) {
  if (is_channels_last(t)) return t;
  Tensor copy = empty_nchw({t.size(0), t.size(1), t.size(2), t.size(3)}, t, true);
  return torch::stable::copy_(copy, t);
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
    const PackedMatrix<A> matrix(
        read_values<A>(proj_weight, op),
        proj_bias.has_value() ? read_values<A>(*proj_bias, op) : std::vector<A>(outputs), channels);
    const bool channels_last = is_channels_last(input);
    const Tensor dense = channels_last ? input : torch::stable::contiguous(input);
    const Map<T> map{dense.const_data_ptr<T>(), channels, height, width, channels_last};
    T* const data = out.mutable_data_ptr<T>();
    if (residual.has_value()) {
      const Tensor added = to_channels_last(*residual);
      project<T>(map, affine, matrix, added.const_data_ptr<T>(), added.size(2), added.size(3), batch, data);
    } else {
      project<T>(map, affine, matrix, nullptr, 0, 0, batch, data);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panfpn_fast, CPU, m) {
  m.impl("group_norm_relu_project", TORCH_BOX(&group_norm_relu_project));
}

}  // namespace panfpn

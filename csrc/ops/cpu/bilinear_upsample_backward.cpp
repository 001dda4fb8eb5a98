#include "ops/cpu/pages.h"
#include "ops/cpu/upsample_gather.h"
#include "ops/group_norm.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// Stores V vectors of channels for each pixel of a row.
template <typename T, typename A, int V>
struct StoreSink {
  T* row;
  int64_t channels, rest;

  PANFPN_ALWAYS_INLINE void put(int64_t x, const Lanes<A> (&lanes)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* const to = row + x * channels + v * kLanes<A>;
      if (V > 1 || rest >= kLanes<A>) {
        store_lanes(lanes[v], to);
      } else {
        store_some<T, A>(lanes[v], rest, to);
      }
    }
  }
  PANFPN_ALWAYS_INLINE void finish() {}
};

template <typename T, typename A>
struct StoreSinks {
  T* row;
  int64_t channels;

  template <int V>
  PANFPN_ALWAYS_INLINE StoreSink<T, A, V> at(int64_t first) const {
    return {row + first, channels, channels - first};
  }
};

template <typename T, typename A>
PANFPN_VECTOR_CLONES void gather_and_store(const RowTaps<T, A>& taps, const CellWeights<A>& weights,
                                           int64_t width, int64_t factor, int64_t channels, T* row) {
  gather_pixels<T, A>(taps, weights, width, factor, channels, StoreSinks<T, A>{row, channels});
}

template <typename T, typename A>
PANFPN_VECTOR_CLONES void store_row(const A* from, int64_t count, T* to) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < count; i += L) {
    Lanes<A> lanes;
    load_lanes(from + i, lanes);
    if (count - i >= L) {
      store_lanes(lanes, to + i);
    } else {
      store_some<T, A>(lanes, count - i, to + i);
    }
  }
}

template <typename T>
void gather(const T* grad, const MapSize& size, bool channels_last, T* out) {
  using A = accumulate_t<T>;
  const CellWeights<A> weights(size.factor);
  const int64_t units = channels_last ? size.batch : size.batch * size.channels;
  const int64_t pixel = channels_last ? size.channels : 1, row_size = size.width * pixel;
  const int64_t large_row = row_size * size.factor, large = size.height * size.factor * large_row;
  torch::stable::parallel_for(
      0, units * size.height, grain_of(size.factor * large_row), [&](int64_t begin, int64_t end) {
        std::vector<A> line(gather_scratch<A>(size.large_width())), low(gather_scratch<A>(size.width));
        RowTaps<T, A> taps;
        for (int64_t i = begin; i < end; ++i) {
          taps.move_to(grad + i / size.height * large, large_row, i % size.height, size.height, size.factor,
                       weights);
          if (channels_last) {
            gather_and_store<T, A>(taps, weights, size.width, size.factor, size.channels, out + i * row_size);
          } else {
            gather_plane_row<T, A>(taps, weights, size.width, size.factor, line.data(), low.data());
            store_row<T, A>(low.data(), size.width, out + i * row_size);
          }
        }
      });
}

Tensor bilinear_upsample_backward(const Tensor& grad, int64_t scale_factor) {
  const char* op = "bilinear_upsample_backward";
  check_scale_factor(scale_factor, op);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(2) % scale_factor == 0 && grad.size(3) % scale_factor == 0, op,
                  ": grad must be [N, C, scale_factor * H, scale_factor * W]");
  const bool channels_last = is_channels_last(grad);
  const Tensor dense = channels_last ? grad : torch::stable::contiguous(grad);
  const MapSize size{grad.size(0), grad.size(1), grad.size(2) / scale_factor, grad.size(3) / scale_factor,
                     scale_factor};
  Tensor out = empty_nchw({size.batch, size.channels, size.height, size.width}, grad, channels_last);
  if (out.numel() == 0) return out;
  dispatch_floating(grad.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* out_data = out.mutable_data_ptr<T>();
    advise_huge_pages(out_data, out.numel() * static_cast<int64_t>(sizeof(T)));
    gather<T>(dense.const_data_ptr<T>(), size, channels_last, out_data);
  });
  return out;
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("bilinear_upsample_backward", TORCH_BOX(&bilinear_upsample_backward));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

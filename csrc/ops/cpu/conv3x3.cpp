// 3x3 convolution by Winograd's F(2x2, 3x3) (Lavin and Gray, Fast Algorithms for Convolutional Neural
// Networks, CVPR 2016, section 4.1): 16 multiplications for four outputs where the definition has 36. The
// matrices are made of halves and ones, so float32 loses nothing by it.
//
// A block of tiles goes through all three steps before the next, so that what is between them stays in the
// second cache.
#include "ops/conv3x3.h"

#include <vector>

#include "ops/cpu/matrix.h"
#include "ops/cpu/pages.h"

namespace panfpn {
namespace {

using Vector = Lanes<float>;

constexpr int kLane = kLanes<float>;

// Products of a transformed tile, 4 x 4.
constexpr int kTaps = 16;

// Tiles of a block; a multiple of kPixelTile.
constexpr int64_t kBlock = 48;

// Tiles of 2 x 2 outputs, which read 4 x 4 inputs from one above and left of them.
struct TileGrid {
  int64_t height, width;

  int64_t columns() const { return (width + 1) / 2; }
  int64_t count() const { return (height + 1) / 2 * columns(); }
  // Of the first output, which is inside the map.
  int64_t y(int64_t tile) const { return tile / columns() * 2; }
  int64_t x(int64_t tile) const { return tile % columns() * 2; }
};

// 4 x 4 pixels -> taps `stride` apart: B^T d B.
PANFPN_VECTOR_CLONES void transform_input(const float* const* pixels, int64_t channels, float* taps,
                                          int64_t stride) {
  for (int64_t c = 0; c < channels; c += kLane) {
    Vector rows[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      Vector d[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) load_lanes(pixels[y * 4 + x] + c, d[y]);
      rows[0][x] = d[0] - d[2];
      rows[1][x] = d[1] + d[2];
      rows[2][x] = d[2] - d[1];
      rows[3][x] = d[1] - d[3];
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      float* const to = taps + y * 4 * stride + c;
      store_lanes(rows[y][0] - rows[y][2], to);
      store_lanes(rows[y][1] + rows[y][2], to + stride);
      store_lanes(rows[y][2] - rows[y][1], to + 2 * stride);
      store_lanes(rows[y][1] - rows[y][3], to + 3 * stride);
    }
  }
}

// Taps -> 2 x 2 pixels: A^T m A.
PANFPN_VECTOR_CLONES void transform_output(const float* taps, int64_t stride, int64_t channels,
                                           float* const* pixels) {
  for (int64_t c = 0; c < channels; c += kLane) {
    Vector rows[2][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      Vector m[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) load_lanes(taps + (y * 4 + x) * stride + c, m[y]);
      rows[0][x] = m[0] + m[1] + m[2];
      rows[1][x] = m[1] - m[2] - m[3];
    }
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      store_lanes(rows[y][0] + rows[y][1] + rows[y][2], pixels[y * 2] + c);
      store_lanes(rows[y][1] - rows[y][2] - rows[y][3], pixels[y * 2 + 1] + c);
    }
  }
}

// One row or column of G: three weights -> four.
PANFPN_ALWAYS_INLINE void transform_three(const Vector& a, const Vector& b, const Vector& c, Vector* to) {
  const Vector ends = a + c;
  to[0] = a;
  to[1] = (ends + b) * 0.5f;
  to[2] = (ends - b) * 0.5f;
  to[3] = c;
}

// Weights [kLane, channels, 3, 3] of outputs from `output` on -> panels `stride` apart: G g G^T.
PANFPN_VECTOR_CLONES void transform_weights(const float* weights, const PanelLayout& layout, int64_t output,
                                            float* panels, int64_t stride) {
  for (int64_t c = 0; c < layout.channels; ++c) {
    alignas(64) float gathered[9][kLane];
    for (int k = 0; k < kLane; ++k) {
      for (int i = 0; i < 9; ++i) gathered[i][k] = weights[(k * layout.channels + c) * 9 + i];
    }
    Vector columns[3][4];  // transformed along y
    for (int x = 0; x < 3; ++x) {
      Vector g[3];
      for (int y = 0; y < 3; ++y) load_lanes(gathered[y * 3 + x], g[y]);
      transform_three(g[0], g[1], g[2], columns[x]);
    }
    float* const to = panels + layout.index(output, c);
    for (int y = 0; y < 4; ++y) {
      Vector u[4];
      transform_three(columns[0][y], columns[1][y], columns[2][y], u);
      for (int x = 0; x < 4; ++x) store_lanes(u[x], to + (y * 4 + x) * stride);
    }
  }
}

// One image [H, W, C] -> [H, W, K].
class Convolution {
 public:
  Convolution(const float* weights, int64_t outputs, int64_t channels, int64_t height, int64_t width)
      : layout_{outputs, channels, kLane},
        grid_{height, width},
        panels_(make_scratch<float>(kTaps * layout_.size())),
        // Planes of a multiple of the page size would all meet in the same lines of the first cache.
        in_plane_(kBlock * channels + kLane),
        out_plane_(kBlock * outputs + kLane),
        zeros_(std::max(channels, outputs)) {
    torch::stable::parallel_for(0, outputs / kLane, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * kLane; k < end * kLane; k += kLane) {
        transform_weights(weights + k * channels * 9, layout_, k, panels_.get(), layout_.size());
      }
    });
  }

  int64_t blocks() const { return (grid_.count() + kBlock - 1) / kBlock; }

  // What a thread needs to convolve blocks.
  struct Workspace {
    Scratch<float> inputs, products, outside;
    explicit Workspace(const Convolution& of)
        : inputs(make_scratch<float>(kTaps * of.in_plane_)),
          products(make_scratch<float>(kTaps * of.out_plane_)),
          outside(make_scratch<float>(of.layout_.outputs)) {
      // A block that is not full is multiplied whole.
      std::fill(inputs.get(), inputs.get() + kTaps * of.in_plane_, 0.0f);
    }
  };

  void convolve(int64_t block, const float* image, float* out, const Workspace& work) const {
    const int64_t first = block * kBlock, count = std::min(kBlock, grid_.count() - first);
    for (int64_t i = 0; i < count; ++i) {
      const float* pixels[16];
      for (int64_t p = 0; p < 16; ++p) {
        const int64_t y = grid_.y(first + i) - 1 + p / 4, x = grid_.x(first + i) - 1 + p % 4;
        const bool inside = y >= 0 && y < grid_.height && x >= 0 && x < grid_.width;
        pixels[p] = inside ? image + (y * grid_.width + x) * layout_.channels : zeros_.data();
      }
      transform_input(pixels, layout_.channels, work.inputs.get() + i * layout_.channels, in_plane_);
    }
    for (int tap = 0; tap < kTaps; ++tap) {
      multiply<float>(work.inputs.get() + tap * in_plane_, layout_.channels, count, layout_,
                      panels_.get() + tap * layout_.size(), zeros_.data(),
                      work.products.get() + tap * out_plane_, layout_.outputs);
    }
    for (int64_t i = 0; i < count; ++i) {
      float* pixels[4];
      for (int64_t p = 0; p < 4; ++p) {
        const int64_t y = grid_.y(first + i) + p / 2, x = grid_.x(first + i) + p % 2;
        const bool inside = y < grid_.height && x < grid_.width;
        pixels[p] = inside ? out + (y * grid_.width + x) * layout_.outputs : work.outside.get();
      }
      transform_output(work.products.get() + i * layout_.outputs, out_plane_, layout_.outputs, pixels);
    }
  }

 private:
  PanelLayout layout_;
  TileGrid grid_;
  Scratch<float> panels_;
  int64_t in_plane_, out_plane_;
  std::vector<float> zeros_;  // the padding of the map; and the bias
};

Tensor conv3x3(const Tensor& input, const Tensor& weight) {
  check_conv3x3_inputs(input, weight);
  const int64_t batch = input.size(0), height = input.size(2), width = input.size(3);
  const int64_t in_size = input.size(1) * height * width, out_size = weight.size(0) * height * width;
  Tensor out = empty_nchw({batch, weight.size(0), height, width}, input, true);
  if (out.numel() == 0) return out;
  const Tensor dense = channels_last(input), weights = torch::stable::contiguous(weight);
  const float* const image = dense.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  advise_huge_pages(to, out.numel() * static_cast<int64_t>(sizeof(float)));
  const Convolution convolution(weights.const_data_ptr<float>(), weight.size(0), input.size(1), height,
                                width);
  const int64_t blocks = convolution.blocks();
  torch::stable::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
    const Convolution::Workspace work(convolution);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks;
      convolution.convolve(i % blocks, image + n * in_size, to + n * out_size, work);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panfpn_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
}

}  // namespace panfpn

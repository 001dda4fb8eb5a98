// The output is much larger than the input, and most of it is outside of every box, so the stores decide the
// speed. A block writes a tile of an image: consecutive bytes, across rows, from a multiple of 16 on. If the
// box overlaps the tile, warps paint it in shared memory, one pixel per lane. Either way the tile is written
// with stores of 16 bytes, and each byte of the output is written once.
#include "ops/cuda/mask_sample.cuh"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr int kColumns = 2;  // columns of a thread
constexpr int kStripColumns = kWarp * kColumns;
constexpr int kChunkBytes = sizeof(uint4);
constexpr int kTileChunks = 2048;
constexpr int kTileBytes = kTileChunks * kChunkBytes;
constexpr int64_t kMaxGridRows = 65535;

struct PasteArguments {
  const float *masks, *boxes;
  int64_t count, mask_height, mask_width, height, width;
  float threshold;
  uint8_t* out;
};

// A range of bytes of the output.
struct Tile {
  int64_t image;   // first byte of the image
  int64_t origin;  // first byte of the tile
  int begin, end;  // bytes of the tile that belong to the image, counted from the origin

  __device__ Tile(int64_t n, int64_t image_bytes) : image(n * image_bytes) {
    origin = image / kChunkBytes * kChunkBytes + int64_t{blockIdx.x} * kTileBytes;
    const int64_t image_end = image + image_bytes - origin;
    begin = image > origin ? static_cast<int>(image - origin) : 0;
    end = image_end < kTileBytes ? static_cast<int>(image_end) : kTileBytes;
  }

  // Returns whether some of the image's rows overlap the tile.
  __device__ bool overlaps(Range rows, int64_t width) const {
    return begin < end && image + rows.begin * width < origin + end &&
           image + rows.end * width > origin + begin;
  }
};

// Paints the part of the box that is in the tile. A warp takes 32 rows of a strip of columns at a time; each
// lane computes the taps of one of these rows for the whole warp.
__device__ void paint(const PasteArguments& args, const Tile& tile, const MaskSampler& sampler, Range rows,
                      Range columns, uint8_t* bytes) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t inset = tile.origin - tile.image;  // offset of the tile in the image
  const int width = static_cast<int>(args.width), right = static_cast<int>(columns.end);
  const int first = static_cast<int>((inset + tile.begin) / width);
  const int last = static_cast<int>((inset + tile.end - 1) / width);
  const int top = max(static_cast<int>(rows.begin), first),
            bottom = min(static_cast<int>(rows.end), last + 1);
  const int strips = (right - static_cast<int>(columns.begin) + kStripColumns - 1) / kStripColumns;
  const int bands = (bottom - top + kWarp - 1) / kWarp;
  for (int unit = warp; unit < strips * bands; unit += kWarps) {
    const int band = unit / strips, y = top + band * kWarp;
    const int left = static_cast<int>(columns.begin) + (unit - band * strips) * kStripColumns + lane;
    const int line = static_cast<int>(int64_t{y} * width - inset) + left;
    const PasteTaps<float> own = sampler.y.taps(y + lane);
    ColumnStrip<kColumns, kWarp> strip(sampler, left);
    const int height = min(kWarp, bottom - y);
    for (int i = 0; i < height; ++i) {
      float values[kColumns];
      strip.values_at(taps_of_lane(own, i), values);
      PANFPN_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        const int byte = line + i * width + j * kWarp;
        const bool in_tile = byte >= 0 && byte < kTileBytes;
        if (in_tile && left + j * kWarp < right) bytes[byte] = paste_pixel(values[j], args.threshold);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) paste_tiles(PasteArguments args) {
  PANFPN_SHARED(uint4, chunks, kTileChunks);
  auto* bytes = reinterpret_cast<uint8_t*>(chunks);
  const int thread = static_cast<int>(threadIdx.x);
  const uint8_t outside = paste_pixel(0.0f, args.threshold);
  const unsigned word = outside * 0x01010101u;
  const uint4 outside_chunk{word, word, word, word};
  for (int64_t n = blockIdx.y; n < args.count; n += gridDim.y) {
    const Tile tile(n, args.height * args.width);
    const MaskSampler sampler(args.masks, args.boxes, n, args.mask_height, args.mask_width);
    const Range rows = sampler.y.window(args.height);
    bool painted = false;
    if (tile.overlaps(rows, args.width)) {
      const Range columns = sampler.x.window(args.width);
      painted = rows.begin < rows.end && columns.begin < columns.end;
      if (painted) {
        PANFPN_UNROLL
        for (int i = 0; i < kTileChunks / kThreads; ++i) chunks[i * kThreads + thread] = outside_chunk;
        __syncthreads();
        paint(args, tile, sampler, rows, columns, bytes);
        __syncthreads();
      }
    }
    uint8_t* out = args.out + tile.origin;
    const int first = (tile.begin + kChunkBytes - 1) / kChunkBytes, last = tile.end / kChunkBytes;
    const auto store = [&](auto chunk_at) {
      PANFPN_UNROLL
      for (int j = 0; j < kTileChunks / kThreads; ++j) {
        const int i = j * kThreads + thread;
        if (i >= first && i < last) *reinterpret_cast<uint4*>(out + i * kChunkBytes) = chunk_at(i);
      }
    };
    painted ? store([&](int i) { return chunks[i]; }) : store([&](int) { return outside_chunk; });
    // The first and the last chunk of an image also contain bytes of its neighbours.
    const int head = min(first * kChunkBytes, tile.end), tail = max(last * kChunkBytes, head);
    const int byte = thread < kChunkBytes ? tile.begin + thread : tail + thread - kChunkBytes;
    if (byte < (thread < kChunkBytes ? head : tile.end)) out[byte] = painted ? bytes[byte] : outside;
    if (painted) __syncthreads();  // before the next image is painted
  }
}

Tensor paste_masks(const Tensor& masks_in, const Tensor& boxes_in, int64_t height, int64_t width,
                   double threshold) {
  check_paste_masks_inputs(masks_in, boxes_in, height, width, "paste_masks");
  STD_TORCH_CHECK(masks_in.scalar_type() == ScalarType::Float,
                  "paste_masks: masks and boxes must be float32 on a GPU");
  const DeviceGuard guard(masks_in.get_device_index());
  const Tensor masks = torch::stable::contiguous(masks_in), boxes = torch::stable::contiguous(boxes_in);
  const int64_t count = masks.size(0), image_bytes = height * width;
  // Fresh memory starts at a multiple of 16.
  Tensor out = empty({count, height, width}, threshold < 0 ? ScalarType::Byte : ScalarType::Bool, masks);
  const PasteArguments args{masks.const_data_ptr<float>(),
                            boxes.const_data_ptr<float>(),
                            count,
                            masks.size(1),
                            masks.size(2),
                            height,
                            width,
                            static_cast<float>(threshold),
                            static_cast<uint8_t*>(out.mutable_data_ptr())};
  // The largest span of an image: its first chunk may also contain bytes of the previous image.
  const int64_t longest = image_bytes + kChunkBytes - 1;
  const int64_t tiles = image_bytes == 0 ? 0 : (longest + kTileBytes - 1) / kTileBytes;
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(count < kMaxGridRows ? count : kMaxGridRows));
  PANFPN_LAUNCH(paste_tiles, grid, dim3(kThreads), 0, current_stream(out), args);
  return out;
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("paste_masks", TORCH_BOX(&paste_masks));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

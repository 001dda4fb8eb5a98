// Most of the output lies outside of every box: it is filled first, as fast as memory takes it, and then each
// box is painted over. Warps write 32 neighbouring bytes at a time, whatever the alignment of a row.
#include "ops/cuda/mask_sample.cuh"

namespace panfpn {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kColumns = 4;  // of a thread
constexpr int kStripColumns = kWarp * kColumns;
constexpr int kBandRows = 8;  // of a warp: enough to make up for setting up its columns
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

struct PasteArguments {
  const float *masks, *boxes;
  int64_t count, mask_height, mask_width, height, width;
  float threshold;
  uint8_t* out;
};

// A warp per tile of an image: `strips` across, `bands` down, counted from the corner of the box.
__global__ void __launch_bounds__(kWarp* kWarps)
    paste_boxes(PasteArguments args, int64_t strips, int64_t bands) {
  const int64_t tiles = args.count * strips * bands, step = int64_t{gridDim.x} * kWarps;
  for (int64_t tile = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; tile < tiles; tile += step) {
    const int64_t n = tile / (strips * bands), strip = tile / bands % strips, band = tile % bands;
    const MaskSampler sampler(args.masks, args.boxes, n, args.mask_height, args.mask_width);
    if (sampler.degenerate()) continue;
    const PixelRange rows = sampler.y.window(args.height), columns = sampler.x.window(args.width);
    const int64_t first = columns.begin + strip * kStripColumns, top = rows.begin + band * kBandRows;
    if (first >= columns.end || top >= rows.end) continue;
    const int64_t bottom = top + kBandRows < rows.end ? top + kBandRows : rows.end;
    const int64_t left = first + threadIdx.x % kWarp;
    ColumnStrip<kColumns, kWarp> strip_columns(sampler, left);
    for (int64_t y = top; y < bottom; ++y) {
      float values[kColumns];
      strip_columns.row(y, values);
      uint8_t* line = args.out + (n * args.height + y) * args.width;
      PANFPN_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        const int64_t x = left + i * kWarp;
        if (x < columns.end) line[x] = paste_pixel(values[i], args.threshold);
      }
    }
  }
}

Tensor paste_masks(const Tensor& masks_in, const Tensor& boxes_in, int64_t height, int64_t width,
                   double threshold) {
  check_paste_masks_inputs(masks_in, boxes_in, height, width);
  STD_TORCH_CHECK(masks_in.scalar_type() == ScalarType::Float, "paste_masks: takes float32 only on a GPU");
  const DeviceGuard guard(masks_in.get_device_index());
  const Tensor masks = torch::stable::contiguous(masks_in), boxes = torch::stable::contiguous(boxes_in);
  const int64_t count = masks.size(0);
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
  const cudaStream_t stream = current_stream(out);
  torch::stable::fill_(out, paste_pixel(0.0f, args.threshold));
  const int64_t strips = (width + kStripColumns - 1) / kStripColumns;
  const int64_t bands = (height + kBandRows - 1) / kBandRows;
  const int64_t blocks = (count * strips * bands + kWarps - 1) / kWarps;
  PANFPN_LAUNCH(paste_boxes, dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)),
                dim3(kWarp * kWarps), 0, stream, args, strips, bands);
  return out;
}

}  // namespace

PANFPN_LIBRARY_IMPL_CUDA(m) {
  m.impl("paste_masks", TORCH_BOX(&paste_masks));
}

}  // namespace panfpn

#include "ops/cuda/mask_sample.cuh"

namespace panfpn {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

// A block per image row, masks one after the other.
__global__ void __launch_bounds__(kThreads)
    paste_rows(const float* masks, const float* boxes, int64_t rows, int64_t mask_height, int64_t mask_width,
               int64_t height, int64_t width, float threshold, uint8_t* out) {
  const uint8_t outside = paste_pixel(0.0f, threshold);
  for (int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const int64_t n = index / height, row = index % height;
    const MaskSampler sampler(masks, boxes, n, mask_height, mask_width);
    const bool degenerate = sampler.degenerate();
    const PasteTaps<float> y = degenerate ? PasteTaps<float>{} : sampler.y.taps(row);
    for (int64_t column = threadIdx.x; column < width; column += kThreads) {
      out[index * width + column] =
          y.inside ? paste_pixel(sampler.value(y, sampler.x.taps(column)), threshold) : outside;
    }
  }
}

Tensor paste_masks(const Tensor& masks_in, const Tensor& boxes_in, int64_t height, int64_t width,
                   double threshold) {
  check_paste_masks_inputs(masks_in, boxes_in, height, width);
  STD_TORCH_CHECK(masks_in.scalar_type() == ScalarType::Float, "paste_masks: takes float32 only on a GPU");
  const DeviceGuard guard(masks_in.get_device_index());
  const Tensor masks = torch::stable::contiguous(masks_in), boxes = torch::stable::contiguous(boxes_in);
  const int64_t count = masks.size(0), rows = count * height;
  Tensor out = empty({count, height, width}, threshold < 0 ? ScalarType::Byte : ScalarType::Bool, masks);
  PANFPN_LAUNCH(paste_rows, dim3(static_cast<unsigned>(rows < kMaxBlocks ? rows : kMaxBlocks)),
                dim3(kThreads), 0, current_stream(out), masks.const_data_ptr<float>(),
                boxes.const_data_ptr<float>(), rows, masks.size(1), masks.size(2), height, width,
                static_cast<float>(threshold), static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace

PANFPN_LIBRARY_IMPL_CUDA(m) {
  m.impl("paste_masks", TORCH_BOX(&paste_masks));
}

}  // namespace panfpn

// One cooperative launch. Every pixel belongs to one thread from beginning to end (a row to a warp, every
// 32nd column to a lane), so that claims need no fence: who reads a pixel is who wrote it. Instances come in
// score order; only their area and the part that others hold are summed over the grid, which costs one grid
// barrier each. Every thread draws the same conclusions from the sums, so that nothing is broadcast. Stuff
// follows the same way: count labels, agree on ids, write them.
#include <tuple>

#include "ops/cuda/cooperative.cuh"
#include "ops/cuda/mask_sample.cuh"
#include "ops/panoptic_merge.h"

namespace panfpn {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kLabelsPerThread = kMaxLabels / kThreads;

// A label map of any of the integer dtypes; a template would multiply the kernel for the sake of one load.
struct Labels {
  const void* data;
  ScalarType dtype;

  __device__ int64_t operator[](int64_t i) const {
    switch (dtype) {
      case ScalarType::Byte:
        return static_cast<const uint8_t*>(data)[i];
      case ScalarType::Short:
        return static_cast<const int16_t*>(data)[i];
      case ScalarType::Int:
        return static_cast<const int32_t*>(data)[i];
      default:
        return static_cast<const int64_t*>(data)[i];
    }
  }
};

struct MergeArguments {
  const float *masks, *boxes;
  const float* scores;
  const int64_t *classes, *order;
  Labels semantic;
  int64_t count, mask_height, mask_width, height, width;
  MergeParams params;
  int32_t* panoptic;                // [height, width], zeros
  unsigned long long* sums;         // [count, 2], zeros: area of each instance, and what of it is claimed
  unsigned long long* label_areas;  // [kMaxLabels], zeros
  int64_t *table, *segments;        // [count + kMaxLabels, kSegmentColumns] and [1]
};

// The rows of `range` that this warp owns.
struct OwnRows {
  int64_t first, end, step;
};

__device__ OwnRows own_rows(PixelRange range) {
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  const int64_t warp = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t skip = (warp - range.begin % warps + warps) % warps;
  return {range.begin + skip, range.end, warps};
}

__device__ void write_row(int64_t* table, int64_t index, bool isthing, int64_t label, int64_t area,
                          int64_t instance) {
  int64_t* row = table + index * kSegmentColumns;
  row[0] = index + 1, row[1] = isthing, row[2] = label, row[3] = area, row[4] = instance;
}

// Calls f(pixel, on) for each pixel of the instance's box that this thread owns, or of the whole image where
// the threshold is such that zero reaches it; f is called by whole warps.
template <typename F>
__device__ void for_own_pixels(const MaskSampler& sampler, int64_t height, int64_t width, float threshold,
                               F&& f) {
  const bool whole_image = threshold <= 0.0f;
  if (!whole_image && sampler.degenerate()) return;
  const PixelRange columns = whole_image ? PixelRange{0, width} : sampler.x.window(width);
  const OwnRows rows = own_rows(whole_image ? PixelRange{0, height} : sampler.y.window(height));
  for (int64_t y = rows.first; y < rows.end; y += rows.step) {
    const PasteTaps<float> row = sampler.y.taps(y);
    for (int64_t base = columns.begin - columns.begin % kWarp; base < columns.end; base += kWarp) {
      const int64_t x = base + threadIdx.x % kWarp;
      const bool on =
          x >= columns.begin && x < columns.end && sampler.value(row, sampler.x.taps(x)) >= threshold;
      f(y * width + x, on);
    }
  }
}

// Places the instances and returns how many segments they became.
__device__ int64_t place_things(const MergeArguments& args) {
  const float threshold = static_cast<float>(args.params.mask_threshold);
  int64_t segments = 0;
  for (int64_t rank = 0; rank < args.count; ++rank) {
    const int64_t n = args.order[rank];
    if (static_cast<double>(args.scores[n]) < args.params.score_threshold) break;
    const MaskSampler sampler(args.masks, args.boxes, n, args.mask_height, args.mask_width);
    int64_t own_area = 0, own_claimed = 0;
    for_own_pixels(sampler, args.height, args.width, threshold, [&](int64_t pixel, bool on) {
      own_area += __popc(__ballot_sync(0xffffffff, on));
      own_claimed += __popc(__ballot_sync(0xffffffff, on && args.panoptic[pixel] != 0));
    });
    if (threadIdx.x % kWarp == 0 && own_area > 0) {
      atomicAdd(args.sums + 2 * rank, static_cast<unsigned long long>(own_area));
      atomicAdd(args.sums + 2 * rank + 1, static_cast<unsigned long long>(own_claimed));
    }
    grid_sync();
    const int64_t area = static_cast<int64_t>(args.sums[2 * rank]);
    const int64_t claimed = static_cast<int64_t>(args.sums[2 * rank + 1]);
    if (area == claimed || overlaps_too_much(claimed, area, args.params.overlap_threshold)) continue;
    const int32_t id = static_cast<int32_t>(segments + 1);
    for_own_pixels(sampler, args.height, args.width, threshold, [&](int64_t pixel, bool on) {
      if (on && args.panoptic[pixel] == 0) args.panoptic[pixel] = id;
    });
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      write_row(args.table, segments, true, args.classes[n], area - claimed, n);
    }
    ++segments;
  }
  return segments;
}

// Calls f(pixel, label) for each free pixel of stuff that this thread owns.
template <typename F>
__device__ void for_own_stuff(const MergeArguments& args, F&& f) {
  const OwnRows rows = own_rows({0, args.height});
  for (int64_t y = rows.first; y < rows.end; y += rows.step) {
    for (int64_t x = threadIdx.x % kWarp; x < args.width; x += kWarp) {
      const int64_t pixel = y * args.width + x, label = args.semantic[pixel];
      if (args.panoptic[pixel] == 0 && label > 0 && label < kMaxLabels) f(pixel, label);
    }
  }
}

__global__ void __launch_bounds__(kThreads) merge(MergeArguments args) {
  PANFPN_SHARED(int32_t, labels,
                kMaxLabels);  // pixels of each label in this block's rows, then the label's id
  PANFPN_SHARED(int32_t, found_before, kThreads);
  const int64_t things = place_things(args);

  for (int label = threadIdx.x; label < kMaxLabels; label += kThreads) labels[label] = 0;
  __syncthreads();
  for_own_stuff(args, [&](int64_t, int64_t label) { atomicAdd(&labels[label], 1); });
  __syncthreads();
  for (int label = threadIdx.x; label < kMaxLabels; label += kThreads) {
    if (labels[label] > 0)
      atomicAdd(args.label_areas + label, static_cast<unsigned long long>(labels[label]));
  }
  grid_sync();

  // Each thread looks at a run of labels; a scan over threads gives the labels that were found before its
  // run.
  const int thread = static_cast<int>(threadIdx.x), first = thread * kLabelsPerThread;
  int32_t found = 0;
  for (int label = first; label < first + kLabelsPerThread; ++label) {
    const int64_t area = static_cast<int64_t>(args.label_areas[label]);
    found += area > 0 && area >= args.params.stuff_area_threshold;
  }
  found_before[thread] = found;
  __syncthreads();
  for (int reach = 1; reach < kThreads; reach *= 2) {
    const int32_t left = thread >= reach ? found_before[thread - reach] : 0;
    __syncthreads();
    found_before[thread] += left;
    __syncthreads();
  }
  int64_t segment = things + found_before[thread] - found;
  for (int label = first; label < first + kLabelsPerThread; ++label) {
    const int64_t area = static_cast<int64_t>(args.label_areas[label]);
    const bool is_segment = area > 0 && area >= args.params.stuff_area_threshold;
    labels[label] = is_segment ? static_cast<int32_t>(segment + 1) : 0;
    if (!is_segment) continue;
    if (blockIdx.x == 0) write_row(args.table, segment, false, label, area, -1);
    ++segment;
  }
  if (blockIdx.x == 0 && thread == kThreads - 1) *args.segments = segment;
  __syncthreads();
  for_own_stuff(args, [&](int64_t pixel, int64_t label) { args.panoptic[pixel] = labels[label]; });
}

void launch_merge(const MergeArguments& args, const Tensor& like) {
  const int64_t resident = cooperative_blocks(merge, kThreads, 0);
  const int64_t wanted = (args.height + kThreads / kWarp - 1) / (kThreads / kWarp);
  const int64_t blocks = wanted < 1 ? 1 : (wanted < resident ? wanted : resident);
  PANFPN_LAUNCH_COOPERATIVE(merge, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                            current_stream(like), args);
}

Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  Tensor out = empty(sizes, dtype, like);
  torch::stable::zero_(out);
  return out;
}

std::tuple<Tensor, Tensor> panoptic_merge(const Tensor& masks_in, const Tensor& boxes_in,
                                          const Tensor& scores_in, const Tensor& classes_in,
                                          const Tensor& semantic_in, double score_threshold,
                                          double overlap_threshold, int64_t stuff_area_threshold,
                                          double mask_threshold, const std::string& rule) {
  check_panoptic_merge_inputs(masks_in, boxes_in, scores_in, classes_in, semantic_in, rule);
  STD_TORCH_CHECK(masks_in.scalar_type() == ScalarType::Float, "panoptic_merge: takes float32 only on a GPU");
  const DeviceGuard guard(masks_in.get_device_index());
  const Tensor masks = torch::stable::contiguous(masks_in), boxes = torch::stable::contiguous(boxes_in),
               scores = torch::stable::contiguous(scores_in), classes = torch::stable::contiguous(classes_in),
               semantic = torch::stable::contiguous(semantic_in);
  const Tensor order = argsort(negate(scores), /*descending=*/false);  // NaN last, as detectron2
  const int64_t count = masks.size(0), height = semantic.size(0), width = semantic.size(1);
  Tensor panoptic = zeros({height, width}, ScalarType::Int, masks);
  const Tensor sums = zeros({count * 2 + kMaxLabels}, ScalarType::Long, masks);
  Tensor table = empty({count + kMaxLabels, kSegmentColumns}, ScalarType::Long, masks);
  const Tensor segments = empty({1}, ScalarType::Long, masks);
  auto* counters = static_cast<unsigned long long*>(sums.mutable_data_ptr());
  launch_merge(
      MergeArguments{masks.const_data_ptr<float>(), boxes.const_data_ptr<float>(),
                     scores.const_data_ptr<float>(), classes.const_data_ptr<int64_t>(),
                     order.const_data_ptr<int64_t>(),
                     Labels{semantic.const_data_ptr(), semantic.scalar_type()}, count, masks.size(1),
                     masks.size(2), height, width,
                     MergeParams{score_threshold, overlap_threshold, stuff_area_threshold, mask_threshold},
                     panoptic.mutable_data_ptr<int32_t>(), counters, counters + count * 2,
                     table.mutable_data_ptr<int64_t>(), segments.mutable_data_ptr<int64_t>()},
      masks);
  return {panoptic, torch::stable::narrow(table, 0, 0, item_int64(segments))};
}

}  // namespace

PANFPN_LIBRARY_IMPL_CUDA(m) {
  m.impl("panoptic_merge", TORCH_BOX(&panoptic_merge));
}

}  // namespace panfpn

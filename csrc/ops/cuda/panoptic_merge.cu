// One cooperative launch. Each pixel belongs to one thread throughout (a piece of a row to a warp, every 32nd
// column of it to a lane). So claims need no fence: the thread that reads a pixel is the one that wrote it.
// Instances are processed in score order. Only their area and their overlap with earlier instances are summed
// over the grid, which needs a grid barrier. Consecutive instances with disjoint boxes cannot take pixels
// from each other, so they share a barrier. All threads draw the same conclusions from the sums, so nothing
// is broadcast. Stuff is processed in the same way: count the labels, assign ids, write them.
#include "ops/cuda/cooperative.cuh"
#include "ops/cuda/mask_sample.cuh"
#include "ops/panoptic_merge.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

constexpr int kThreads = 512;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = 4;  // columns of a thread in one piece of a row
constexpr int kPiece = kWarp * kColumns;
constexpr int kWave = 8;  // maximum number of instances between two grid barriers
constexpr int kLabelsPerThread = kMaxLabels / kThreads;

// A label map of any integer dtype. A template would compile the whole kernel once for each dtype, for a
// single load.
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
  int32_t* panoptic;  // [height, width], zeros
  unsigned long long*
      sums;  // [count, 2], zeros: the area of each instance, and its overlap with earlier ones
  unsigned long long* label_areas;  // [kMaxLabels], zeros
  int64_t *table, *segments;        // [max_segments, kSegmentColumns] and []
  int64_t max_segments;
  bool pad;  // whether to fill the rest of the table
};

// Calls f(y, x) for each piece of a row that this warp owns and that overlaps the ranges; x is the first
// column of the lane.
template <typename F>
__device__ void for_own_pieces(const MergeArguments& args, Range rows, Range columns, F&& f) {
  const int64_t pieces = (args.width + kPiece - 1) / kPiece;  // pieces in a row
  if (pieces == 0) return;
  const int64_t warps = int64_t{gridDim.x} * kWarps;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const int64_t before = rows.begin * pieces;
  const int64_t first = before <= warp ? warp : warp + (before - warp + warps - 1) / warps * warps;
  const int64_t rows_on = warps / pieces, pieces_on = warps % pieces;
  int64_t y = first / pieces, piece = first % pieces;
  while (y < rows.end) {
    const int64_t begin = piece * kPiece;
    if (begin < columns.end && begin + kPiece > columns.begin) f(y, begin + threadIdx.x % kWarp);
    y += rows_on, piece += pieces_on;
    if (piece >= pieces) piece -= pieces, ++y;
  }
}

__device__ void write_row(const MergeArguments& args, int64_t index, bool isthing, int64_t label,
                          int64_t area, int64_t instance) {
  if (index >= args.max_segments) return;
  int64_t* row = args.table + index * kSegmentColumns;
  row[0] = index + 1, row[1] = isthing, row[2] = label, row[3] = area, row[4] = instance;
}

// An instance and its pixels on the image.
struct Candidate {
  int64_t n, rank;
  Range rows, columns;

  __device__ bool overlaps(const Candidate& other) const {
    return rows.begin < other.rows.end && other.rows.begin < rows.end && columns.begin < other.columns.end &&
           other.columns.begin < columns.end;
  }
};

__device__ MaskSampler sampler_of(const MergeArguments& args, int64_t n) {
  return {args.masks, args.boxes, n, args.mask_height, args.mask_width};
}

// The window of the box, or the whole image if the value zero reaches the threshold.
__device__ Candidate candidate_at(const MergeArguments& args, int64_t rank) {
  const int64_t n = args.order[rank];
  const Range all_rows{0, args.height}, all_columns{0, args.width}, none{0, 0};
  if (static_cast<float>(args.params.mask_threshold) <= 0.0f) return {n, rank, all_rows, all_columns};
  const MaskSampler sampler = sampler_of(args, n);
  if (sampler.degenerate()) return {n, rank, none, none};
  return {n, rank, sampler.y.window(args.height), sampler.x.window(args.width)};
}

// Takes instances from `rank` on as long as their boxes are disjoint; returns their number in `wave`.
__device__ int next_wave(const MergeArguments& args, int64_t& rank, Candidate (&wave)[kWave]) {
  int size = 0;
  for (; rank < args.count && size < kWave; ++rank) {
    const Placement turn = placement(args.scores[args.order[rank]], args.params);
    if (turn == Placement::stop) {
      rank = args.count;
      break;
    }
    if (turn == Placement::skip) continue;
    const Candidate candidate = candidate_at(args, rank);
    for (int i = 0; i < size; ++i) {
      if (wave[i].overlaps(candidate)) return size;
    }
    wave[size++] = candidate;
  }
  return size;
}

// Calls f(pixel, on) for each pixel around the candidate's box that this thread owns. Whole warps call f.
template <typename F>
__device__ void for_own_pixels(const MergeArguments& args, const Candidate& candidate, F&& f) {
  const MaskSampler sampler = sampler_of(args, candidate.n);
  const float threshold = static_cast<float>(args.params.mask_threshold);
  for_own_pieces(args, candidate.rows, candidate.columns, [&](int64_t y, int64_t first) {
    ColumnStrip<kColumns, kWarp> strip(sampler, first);
    float values[kColumns];
    strip.values_at(sampler.y.taps(y), values);
    PANFPN_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      const int64_t x = first + i * kWarp;
      f(y * args.width + x, x < args.width && values[i] >= threshold);
    }
  });
}

// Places the instances and returns the number of their segments.
__device__ int64_t place_things(const MergeArguments& args) {
  // 32 bits suffice for an image's pixels (launch_merge checks this), and 64-bit sums in shared memory would
  // be loops of compare and swap.
  PANFPN_SHARED(unsigned int, block_sums, 2 * kWave);
  const int thread = static_cast<int>(threadIdx.x);
  int64_t segments = 0, rank = 0;
  Candidate wave[kWave];
  while (const int size = next_wave(args, rank, wave)) {
    if (thread < 2 * kWave) block_sums[thread] = 0;
    __syncthreads();
    for (int i = 0; i < size; ++i) {
      unsigned int own_area = 0, own_claimed = 0;
      for_own_pixels(args, wave[i], [&](int64_t pixel, bool on) {
        own_area += __popc(__ballot_sync(0xffffffff, on));
        own_claimed += __popc(__ballot_sync(0xffffffff, on && args.panoptic[pixel] != 0));
      });
      if (threadIdx.x % kWarp == 0 && own_area > 0) {
        atomicAdd(&block_sums[2 * i], own_area);
        atomicAdd(&block_sums[2 * i + 1], own_claimed);
      }
    }
    __syncthreads();
    if (thread < 2 * size && block_sums[thread] > 0) {
      atomicAdd(args.sums + 2 * wave[thread / 2].rank + thread % 2,
                static_cast<unsigned long long>(block_sums[thread]));
    }
    grid_sync();
    for (int i = 0; i < size; ++i) {
      const int64_t area = static_cast<int64_t>(args.sums[2 * wave[i].rank]);
      const int64_t claimed = static_cast<int64_t>(args.sums[2 * wave[i].rank + 1]);
      if (area == claimed || overlaps_too_much(claimed, area, args.params)) continue;
      const int32_t id = static_cast<int32_t>(segments + 1);
      for_own_pixels(args, wave[i], [&](int64_t pixel, bool on) {
        if (on && args.panoptic[pixel] == 0) args.panoptic[pixel] = id;
      });
      if (blockIdx.x == 0 && thread == 0) {
        write_row(args, segments, true, args.classes[wave[i].n], area - claimed, wave[i].n);
      }
      ++segments;
    }
  }
  return segments;
}

// Calls f(pixel, label) for each free stuff pixel that this thread owns.
template <typename F>
__device__ void for_own_stuff(const MergeArguments& args, F&& f) {
  for_own_pieces(args, {0, args.height}, {0, args.width}, [&](int64_t y, int64_t first) {
    for (int64_t x = first; x < first + kPiece && x < args.width; x += kWarp) {
      const int64_t pixel = y * args.width + x, label = args.semantic[pixel];
      if (args.panoptic[pixel] == 0 && label > 0 && label < kMaxLabels) f(pixel, label);
    }
  });
}

__global__ void __launch_bounds__(kThreads) merge(MergeArguments args) {
  PANFPN_SHARED(int32_t, labels,
                kMaxLabels);  // pixels of each label in this block, then the id of each label
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

  // Each thread processes consecutive labels. A scan over the threads gives the number of labels that were
  // found before those.
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
    if (blockIdx.x == 0) write_row(args, segment, false, label, area, -1);
    ++segment;
  }
  if (blockIdx.x == 0 && thread == kThreads - 1) *args.segments = segment;
  if (args.pad && blockIdx.x == 0) {
    for (int64_t i = things + found_before[kThreads - 1] + thread; i < args.max_segments; i += kThreads) {
      int64_t* row = args.table + i * kSegmentColumns;
      row[0] = 0, row[1] = 0, row[2] = -1, row[3] = 0, row[4] = -1;
    }
  }
  __syncthreads();
  for_own_stuff(args, [&](int64_t pixel, int64_t label) { args.panoptic[pixel] = labels[label]; });
}

void launch_merge(const MergeArguments& args, const Tensor& like) {
  constexpr int64_t kMostPixels = int64_t{1} << 31;  // also the largest counts of labels in a block
  STD_TORCH_CHECK(args.height * args.width < kMostPixels, "panoptic_merge: at most ", kMostPixels - 1,
                  " pixels are supported on a GPU, got ", args.height, " x ", args.width);
  const int64_t resident = cooperative_blocks(merge, kThreads, 0);
  const int64_t pieces = args.height * ((args.width + kPiece - 1) / kPiece);
  const int64_t wanted = (pieces + kWarps - 1) / kWarps;
  const int64_t blocks = wanted < 1 ? 1 : (wanted < resident ? wanted : resident);
  PANFPN_LAUNCH_COOPERATIVE(merge, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                            current_stream(like), args);
}

Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  Tensor out = empty(sizes, dtype, like);
  torch::stable::zero_(out);
  return out;
}

}  // namespace

Merged merge_segments(const MergeInputs& inputs, const MergeParams& params,
                      std::optional<int64_t> max_segments, const char* op) {
  STD_TORCH_CHECK(inputs.masks.scalar_type() == ScalarType::Float, op,
                  ": masks and boxes must be float32 on a GPU");
  const DeviceGuard guard(inputs.masks.get_device_index());
  const Tensor masks = torch::stable::contiguous(inputs.masks),
               boxes = torch::stable::contiguous(inputs.boxes),
               scores = torch::stable::contiguous(inputs.scores),
               classes = torch::stable::contiguous(inputs.classes),
               semantic = torch::stable::contiguous(inputs.semantic);
  const Tensor order = argsort(negate(scores), /*descending=*/false);  // NaN last, as in detectron2
  const int64_t count = masks.size(0), height = semantic.size(0), width = semantic.size(1);
  const int64_t rows = max_segments.value_or(count + kMaxLabels);
  Merged merged{zeros({height, width}, ScalarType::Int, masks),
                empty({rows, kSegmentColumns}, ScalarType::Long, masks), empty({}, ScalarType::Long, masks)};
  const Tensor sums = zeros({count * 2 + kMaxLabels}, ScalarType::Long, masks);
  auto* counters = static_cast<unsigned long long*>(sums.mutable_data_ptr());
  launch_merge(
      MergeArguments{masks.const_data_ptr<float>(), boxes.const_data_ptr<float>(),
                     scores.const_data_ptr<float>(), classes.const_data_ptr<int64_t>(),
                     order.const_data_ptr<int64_t>(),
                     Labels{semantic.const_data_ptr(), semantic.scalar_type()}, count, masks.size(1),
                     masks.size(2), height, width, params, merged.panoptic.mutable_data_ptr<int32_t>(),
                     counters, counters + count * 2, merged.segments.mutable_data_ptr<int64_t>(),
                     merged.count.mutable_data_ptr<int64_t>(), rows, /*pad=*/max_segments.has_value()},
      masks);
  if (!max_segments.has_value()) {
    merged.segments = torch::stable::narrow(merged.segments, 0, 0, item_int64(merged.count));
  }
  return merged;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// One cooperative launch. Every pixel belongs to one thread from beginning to end (a piece of a row to a
// warp, every 32nd column of it to a lane), so that claims need no fence: who reads a pixel is who wrote it.
// Instances come in score order; only their area and the part that others hold are summed over the grid,
// which costs a grid barrier. Neighbours in the order whose boxes do not meet cannot take pixels from each
// other, so they share one. Every thread draws the same conclusions from the sums, so that nothing is
// broadcast. Stuff follows the same way: count labels, agree on ids, write them.
#include <tuple>

#include "ops/cuda/cooperative.cuh"
#include "ops/cuda/mask_sample.cuh"
#include "ops/panoptic_merge.h"

namespace panfpn {
namespace {

constexpr int kThreads = 512;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = 4;  // of a thread, in one piece of a row
constexpr int kPiece = kWarp * kColumns;
constexpr int kWave = 8;  // instances between two grid barriers, at most
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
  int64_t *table, *segments;        // [max_segments, kSegmentColumns] and []
  int64_t max_segments;
  bool pad;  // fill the rest of the table
};

// Calls f(y, x) for each piece of a row that this warp owns and that lies within the ranges in part; x is the
// lane's first column.
template <typename F>
__device__ void for_own_pieces(const MergeArguments& args, PixelRange rows, PixelRange columns, F&& f) {
  const int64_t pieces = (args.width + kPiece - 1) / kPiece;  // of a row
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

// An instance, and where on the image its pixels are.
struct Candidate {
  int64_t n, rank;
  PixelRange rows, columns;

  __device__ bool meets(const Candidate& other) const {
    return rows.begin < other.rows.end && other.rows.begin < rows.end && columns.begin < other.columns.end &&
           other.columns.begin < columns.end;
  }
};

__device__ MaskSampler sampler_of(const MergeArguments& args, int64_t n) {
  return {args.masks, args.boxes, n, args.mask_height, args.mask_width};
}

// The box, or the whole image where the threshold is such that zero reaches it.
__device__ Candidate candidate_at(const MergeArguments& args, int64_t rank) {
  const int64_t n = args.order[rank];
  const PixelRange all_rows{0, args.height}, all_columns{0, args.width}, none{0, 0};
  if (static_cast<float>(args.params.mask_threshold) <= 0.0f) return {n, rank, all_rows, all_columns};
  const MaskSampler sampler = sampler_of(args, n);
  if (sampler.degenerate()) return {n, rank, none, none};
  return {n, rank, sampler.y.window(args.height), sampler.x.window(args.width)};
}

// Takes instances from `rank` on as long as their boxes do not meet; returns how many there are in `wave`.
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
      if (wave[i].meets(candidate)) return size;
    }
    wave[size++] = candidate;
  }
  return size;
}

// Calls f(pixel, on) for each pixel around the candidate's box that this thread owns; f is called by whole
// warps.
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

// Places the instances and returns how many segments they became.
__device__ int64_t place_things(const MergeArguments& args) {
  PANFPN_SHARED(unsigned long long, block_sums, 2 * kWave);
  const int thread = static_cast<int>(threadIdx.x);
  int64_t segments = 0, rank = 0;
  Candidate wave[kWave];
  while (const int size = next_wave(args, rank, wave)) {
    if (thread < 2 * kWave) block_sums[thread] = 0;
    __syncthreads();
    for (int i = 0; i < size; ++i) {
      int64_t own_area = 0, own_claimed = 0;
      for_own_pixels(args, wave[i], [&](int64_t pixel, bool on) {
        own_area += __popc(__ballot_sync(0xffffffff, on));
        own_claimed += __popc(__ballot_sync(0xffffffff, on && args.panoptic[pixel] != 0));
      });
      if (threadIdx.x % kWarp == 0 && own_area > 0) {
        atomicAdd(&block_sums[2 * i], static_cast<unsigned long long>(own_area));
        atomicAdd(&block_sums[2 * i + 1], static_cast<unsigned long long>(own_claimed));
      }
    }
    __syncthreads();
    if (thread < 2 * size && block_sums[thread] > 0) {
      atomicAdd(args.sums + 2 * wave[thread / 2].rank + thread % 2, block_sums[thread]);
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

// Calls f(pixel, label) for each free pixel of stuff that this thread owns.
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

struct Merged {
  Tensor panoptic, table, count;
};

Merged merge_into_table(const Tensor& masks_in, const Tensor& boxes_in, const Tensor& scores_in,
                        const Tensor& classes_in, const Tensor& semantic_in, const MergeParams& params,
                        int64_t max_segments, bool pad, const char* op) {
  check_panoptic_merge_inputs(masks_in, boxes_in, scores_in, classes_in, semantic_in, op);
  STD_TORCH_CHECK(masks_in.scalar_type() == ScalarType::Float, op, ": takes float32 only on a GPU");
  const DeviceGuard guard(masks_in.get_device_index());
  const Tensor masks = torch::stable::contiguous(masks_in), boxes = torch::stable::contiguous(boxes_in),
               scores = torch::stable::contiguous(scores_in), classes = torch::stable::contiguous(classes_in),
               semantic = torch::stable::contiguous(semantic_in);
  const Tensor order = argsort(negate(scores), /*descending=*/false);  // NaN last, as detectron2
  const int64_t count = masks.size(0), height = semantic.size(0), width = semantic.size(1);
  const Merged merged{zeros({height, width}, ScalarType::Int, masks),
                      empty({max_segments, kSegmentColumns}, ScalarType::Long, masks),
                      empty({}, ScalarType::Long, masks)};
  const Tensor sums = zeros({count * 2 + kMaxLabels}, ScalarType::Long, masks);
  auto* counters = static_cast<unsigned long long*>(sums.mutable_data_ptr());
  launch_merge(
      MergeArguments{masks.const_data_ptr<float>(), boxes.const_data_ptr<float>(),
                     scores.const_data_ptr<float>(), classes.const_data_ptr<int64_t>(),
                     order.const_data_ptr<int64_t>(),
                     Labels{semantic.const_data_ptr(), semantic.scalar_type()}, count, masks.size(1),
                     masks.size(2), height, width, params, merged.panoptic.mutable_data_ptr<int32_t>(),
                     counters, counters + count * 2, merged.table.mutable_data_ptr<int64_t>(),
                     merged.count.mutable_data_ptr<int64_t>(), max_segments, pad},
      masks);
  return merged;
}

std::tuple<Tensor, Tensor> panoptic_merge(const Tensor& masks, const Tensor& boxes, const Tensor& scores,
                                          const Tensor& classes, const Tensor& semantic,
                                          double score_threshold, double overlap_threshold,
                                          int64_t stuff_area_threshold, double mask_threshold,
                                          const std::string& rule) {
  const char* op = "panoptic_merge";
  const MergeParams params{score_threshold, overlap_threshold, stuff_area_threshold, mask_threshold,
                           merge_rule(rule, op)};
  Merged merged = merge_into_table(masks, boxes, scores, classes, semantic, params,
                                   masks.size(0) + kMaxLabels, /*pad=*/false, op);
  return {merged.panoptic, torch::stable::narrow(merged.table, 0, 0, item_int64(merged.count))};
}

std::tuple<Tensor, Tensor, Tensor> panoptic_merge_padded(const Tensor& masks, const Tensor& boxes,
                                                         const Tensor& scores, const Tensor& classes,
                                                         const Tensor& semantic, double score_threshold,
                                                         double overlap_threshold,
                                                         int64_t stuff_area_threshold, double mask_threshold,
                                                         const std::string& rule, int64_t max_segments) {
  const char* op = "panoptic_merge_padded";
  STD_TORCH_CHECK(max_segments >= 0, op, ": max_segments must not be negative");
  const MergeParams params{score_threshold, overlap_threshold, stuff_area_threshold, mask_threshold,
                           merge_rule(rule, op)};
  const Merged merged =
      merge_into_table(masks, boxes, scores, classes, semantic, params, max_segments, /*pad=*/true, op);
  return {merged.panoptic, merged.table, merged.count};
}

}  // namespace

PANFPN_LIBRARY_IMPL_CUDA(m) {
  m.impl("panoptic_merge", TORCH_BOX(&panoptic_merge));
  m.impl("panoptic_merge_padded", TORCH_BOX(&panoptic_merge_padded));
}

}  // namespace panfpn

// Five launches and no barrier between blocks. `plan` ranks the instances by score and finds their windows on
// the image. `rasterise` pastes their masks into bits, 32 pixels to a word, and counts their areas. `place`,
// a single block, walks through the instances in score order with a bitmap of the pixels that are taken; its
// work is counting and combining words. `paint` writes the ids of instances, and counts the labels of the
// other pixels. `fill_stuff` gives ids to the labels and writes them.
//
// The bits of many instances on a large image take much memory. So instances are processed in batches, of
// which one suffices nearly always.
#include <algorithm>

#include "ops/cuda/launch.cuh"
#include "ops/cuda/mask_sample.cuh"
#include "ops/cuda/warp_reduce.cuh"
#include "ops/panoptic_merge.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned int kAllLanes = 0xFFFFFFFFu;
constexpr int kWave = 8;  // maximum number of instances that are placed at once

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

// The words of the image in which an instance can have pixels; none if the instance is dropped for its score.
struct Window {
  int n;  // index of the instance
  int first_row, rows, first_word, words;

  __device__ bool overlaps(const Window& other) const {
    return first_row < other.first_row + other.rows && other.first_row < first_row + rows &&
           first_word < other.first_word + other.words && other.first_word < first_word + words;
  }
  // The index of the window's word `i` in a bitmap of the image.
  __device__ unsigned at(unsigned i, unsigned row_words) const {
    const unsigned row = i / static_cast<unsigned>(words);
    return (first_row + row) * row_words + first_word + (i - row * words);
  }
};

struct MergeArguments {
  const float *masks, *boxes, *scores;
  const int64_t *classes, *order;  // order may be null
  Labels semantic;
  int count, mask_height, mask_width, height, width;
  int row_words;  // words of a bitmap for each row of the image
  MergeParams params;
  // Scratch. Arrays are indexed by the rank of an instance, except `placed`, by its position among the
  // placed.
  Window* windows;
  unsigned int* areas;
  int* wave_ends;              // of a wave that begins at this rank
  int* placed;                 // ranks
  int* things;                 // [2]: the number of placed instances before this batch and after it
  unsigned int* label_areas;   // [kMaxLabels]
  unsigned int *bits, *taken;  // bitmaps: one for each instance of a batch; pixels taken by earlier batches
  // Outputs.
  int32_t* panoptic;          // [height, width]
  int64_t *table, *segments;  // [max_segments, kSegmentColumns] and []
  int64_t max_segments;
  bool pad;  // whether to fill the rest of the table
};

// The ranks that are processed together.
struct Batch {
  int begin, end;
};

__device__ int64_t bitmap_words(const MergeArguments& args) {
  return int64_t{args.height} * args.row_words;
}

__device__ void write_row(const MergeArguments& args, int64_t index, bool isthing, int64_t label,
                          int64_t area, int64_t instance) {
  if (index >= args.max_segments) return;
  int64_t* row = args.table + index * kSegmentColumns;
  row[0] = index + 1, row[1] = isthing, row[2] = label, row[3] = area, row[4] = instance;
}

__device__ MaskSampler sampler_of(const MergeArguments& args, int64_t n) {
  return {args.masks, args.boxes, n, args.mask_height, args.mask_width};
}

// The rank of an instance by descending score; NaN last, equal scores by index.
__device__ int rank_of(const MergeArguments& args, int n) {
  const float score = args.scores[n];
  int before = 0;
  for (int i = 0; i < args.count; ++i) {
    const float other = args.scores[i];
    const bool equal = other == score || (std::isnan(other) && std::isnan(score));
    before += other > score || (std::isnan(score) && !std::isnan(other)) || (equal && i < n) ? 1 : 0;
  }
  return before;
}

// Whether the score of an instance lets it be placed. An instance that stops the placement comes before those
// with NaN, which come last.
__device__ bool score_suffices(const MergeArguments& args, float score) {
  if (placement(score, args.params) != Placement::place) return false;
  if (!std::isnan(score)) return true;
  for (int i = 0; i < args.count; ++i) {
    if (placement(args.scores[i], args.params) == Placement::stop) return false;
  }
  return true;
}

// The window of the box, or the whole image if the value zero reaches the threshold.
__device__ Window window_of(const MergeArguments& args, int n) {
  if (!score_suffices(args, args.scores[n])) return {n, 0, 0, 0, 0};
  if (static_cast<float>(args.params.mask_threshold) <= 0.0f) return {n, 0, args.height, 0, args.row_words};
  const MaskSampler sampler = sampler_of(args, n);
  if (sampler.degenerate()) return {n, 0, 0, 0, 0};
  const Range rows = sampler.y.window(args.height), columns = sampler.x.window(args.width);
  if (rows.size() == 0 || columns.size() == 0) return {n, 0, 0, 0, 0};
  const int first_word = static_cast<int>(columns.begin / kWarp);
  const int last_word = static_cast<int>((columns.end - 1) / kWarp);
  return {n, static_cast<int>(rows.begin), static_cast<int>(rows.size()), first_word,
          last_word - first_word + 1};
}

__global__ void __launch_bounds__(kThreads) plan(MergeArguments args) {
  const int first = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int step = static_cast<int>(gridDim.x) * kThreads;
  for (int label = first; label < kMaxLabels; label += step) args.label_areas[label] = 0;
  if (first < 2) args.things[first] = 0;
  for (int i = first; i < args.count; i += step) {
    const int n = args.order != nullptr ? static_cast<int>(args.order[i]) : i;
    const int rank = args.order != nullptr ? i : rank_of(args, n);
    args.windows[rank] = window_of(args, n);
    args.areas[rank] = 0;
  }
}

constexpr int kStripWords = 4;  // words of a row that a warp pastes together
constexpr int kBandRows = 16;

// Finds where a wave of instances ends that begins at `rank`: consecutive instances with disjoint windows
// cannot take pixels from each other. One warp calls this.
__device__ void find_wave_end(const MergeArguments& args, const Batch& batch, int rank) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, last = min(rank + kWave, batch.end);
  bool meets = rank + lane >= last;
  for (int other = rank; other < rank + lane && !meets; ++other) {
    meets = args.windows[rank + lane].overlaps(args.windows[other]);
  }
  const int size = __ffs(static_cast<int>(__ballot_sync(kAllLanes, meets))) - 1;
  if (lane == 0) args.wave_ends[rank] = rank + size;
}

// Blocks with the same y share an instance. A warp pastes strips of its window.
__global__ void __launch_bounds__(kThreads) rasterise(MergeArguments args, Batch batch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const float threshold = static_cast<float>(args.params.mask_threshold);
  for (int rank = batch.begin + static_cast<int>(blockIdx.y); rank < batch.end;
       rank += static_cast<int>(gridDim.y)) {
    if (blockIdx.x == 0 && warp == 0) find_wave_end(args, batch, rank);
    const Window window = args.windows[rank];
    unsigned int* bits = args.bits + (rank - batch.begin) * bitmap_words(args);
    const MaskSampler sampler = sampler_of(args, window.n);
    const int across = (window.words + kStripWords - 1) / kStripWords;
    const int strips = across * ((window.rows + kBandRows - 1) / kBandRows);
    unsigned int area = 0;
    for (int i = static_cast<int>(blockIdx.x) * kWarps + warp; i < strips;
         i += static_cast<int>(gridDim.x) * kWarps) {
      const int band = i / across, first_word = window.first_word + (i - band * across) * kStripWords;
      const int words = min(kStripWords, window.first_word + window.words - first_word);
      const int first_row = window.first_row + band * kBandRows;
      const int last_row = min(first_row + kBandRows, window.first_row + window.rows);
      const int first_column = first_word * kWarp + lane;
      ColumnStrip<kStripWords, kWarp> strip(sampler, first_column);
      for (int y = first_row; y < last_row; ++y) {
        float values[kStripWords];
        strip.values_at(sampler.y.taps(y), values);
        unsigned int own = 0;
        PANFPN_UNROLL
        for (int word = 0; word < kStripWords; ++word) {
          const bool on = first_column + word * kWarp < args.width && values[word] >= threshold;
          const unsigned int row_bits = __ballot_sync(kAllLanes, on);
          if (lane == word) own = row_bits;
        }
        if (lane < words) {
          bits[int64_t{y} * args.row_words + first_word + lane] = own;
          area += __popc(own);
        }
      }
    }
    const unsigned int warp_area = warp_sum(area);
    if (lane == 0 && warp_area > 0) atomicAdd(args.areas + rank, warp_area);
  }
}

constexpr int kPlaceThreads = 1024;
constexpr int kPlaceWarps = kPlaceThreads / kWarp;
constexpr int kGroup = 256;  // instances whose windows are in shared memory at once

// The number of pixels of an instance that may be taken: integers, so that placing needs no division.
__device__ int64_t most_claimed(int64_t area, const MergeParams& params) {
  const double share = params.overlap_threshold * static_cast<double>(area);
  int64_t claimed =
      share >= static_cast<double>(area) ? area : (share > 0.0 ? static_cast<int64_t>(share) : 0);
  while (claimed < area && !overlaps_too_much(claimed + 1, area, params)) ++claimed;
  while (claimed >= 0 && overlaps_too_much(claimed, area, params)) --claimed;
  return claimed;
}

struct Candidate {
  Window window;
  unsigned int area;
  int most_claimed;  // -1: never placed
};

// Calls f(at, bits) for the words of each instance in a wave whose bit in `chosen` is set, then end(i) in
// whole warps; `at` is the index of the word in the image. Instance i takes whole rounds of the block's warps
// in turn.
template <typename F, typename End>
__device__ void for_wave_words(const MergeArguments& args, const Batch& batch, const Candidate* wave,
                               int rank, int size, unsigned int chosen, F&& f, End&& end) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int turn = 0;  // the warp that takes the next round
  for (int i = 0; i < size; ++i) {
    if ((chosen >> i & 1) == 0) continue;
    const Window window = wave[i].window;
    const unsigned int* bits = args.bits + (rank + i - batch.begin) * bitmap_words(args);
    const unsigned words = static_cast<unsigned>(window.rows) * window.words;
    const unsigned rounds = (words + kWarp - 1) / kWarp;
    PANFPN_UNROLL_BY(4)
    for (unsigned round = (warp - turn) & (kPlaceWarps - 1); round < rounds; round += kPlaceWarps) {
      const unsigned word = round * kWarp + lane;
      if (word >= words) continue;
      const unsigned at = window.at(word, args.row_words);
      f(at, bits[at]);
    }
    turn = static_cast<int>((turn + rounds) & (kPlaceWarps - 1));
    end(i);
  }
}

// One block.
__global__ void __launch_bounds__(kPlaceThreads) place(MergeArguments args, Batch batch, bool in_shared) {
  PANFPN_SHARED(Candidate, group, kGroup);
  PANFPN_SHARED(int, ends, kGroup);
  PANFPN_SHARED(unsigned int, claimed, 2 * kWave);  // of the instances of this wave and of the next one
  PANFPN_DYNAMIC_SHARED(unsigned int, shared_taken);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  unsigned int* taken = in_shared ? shared_taken : args.taken;
  for (int64_t i = thread; i < bitmap_words(args); i += kPlaceThreads) {
    if (batch.begin == 0) {
      taken[i] = 0;
    } else if (in_shared) {
      taken[i] = args.taken[i];
    }
  }
  if (thread < 2 * kWave) claimed[thread] = 0;
  const int before = args.things[1];
  int segments = before;
  unsigned int *sums = claimed, *next_sums = claimed + kWave;
  __syncthreads();
  for (int first = batch.begin; first < batch.end; first += kGroup) {
    const int last = min(first + kGroup, batch.end);
    for (int i = first + thread; i < last; i += kPlaceThreads) {
      const unsigned int area = args.areas[i];
      const int most = area == 0 ? -1 : static_cast<int>(most_claimed(area, args.params));
      group[i - first] = {args.windows[i], area, most};
      ends[i - first] = min(args.wave_ends[i], last);
    }
    __syncthreads();
    int rank = first;
    while (rank < last) {
      const Candidate* wave = group + (rank - first);
      const int end = ends[rank - first], size = end - rank;
      unsigned int own = 0;
      for_wave_words(
          args, batch, wave, rank, size, kAllLanes,
          [&](unsigned at, unsigned bits) { own += __popc(bits & taken[at]); },
          [&](int i) {
            const unsigned int sum = warp_sum(own);
            if (lane == 0 && sum > 0) atomicAdd(&sums[i], sum);
            own = 0;
          });
      __syncthreads();
      unsigned int chosen = 0;
      for (int i = 0; i < size; ++i) {
        const int taken_pixels = static_cast<int>(sums[i]);
        if (taken_pixels > wave[i].most_claimed || sums[i] == wave[i].area) continue;
        chosen |= 1u << i;
        if (thread == 0) {
          const int n = wave[i].window.n;
          write_row(args, segments, true, args.classes[n], wave[i].area - sums[i], n);
          args.placed[segments] = rank + i;
        }
        ++segments;
      }
      for_wave_words(
          args, batch, wave, rank, size, chosen, [&](unsigned at, unsigned bits) { taken[at] |= bits; },
          [](int) {});
      if (thread < kWave) next_sums[thread] = 0;
      __syncthreads();
      unsigned int* const done = sums;
      sums = next_sums, next_sums = done;
      rank = end;
    }
  }
  if (in_shared && args.taken != nullptr) {
    for (int64_t i = thread; i < bitmap_words(args); i += kPlaceThreads) args.taken[i] = taken[i];
  }
  if (thread == 0) args.things[0] = before, args.things[1] = segments;
}

constexpr int kPaintWarps = 4;
constexpr int kPaintThreads = kPaintWarps * kWarp;
constexpr int kTilePitch = kWarp + 1;  // odd, so that lanes with a word each write to different banks

// A lane takes a word, then, when the ids of all words are known, one pixel of each of them.
__global__ void __launch_bounds__(kPaintThreads) paint(MergeArguments args, Batch batch, bool last_batch) {
  PANFPN_SHARED(int32_t, tiles, kPaintWarps * kWarp * kTilePitch);
  PANFPN_SHARED(unsigned int, labels, kMaxLabels);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  int32_t* tile = tiles + warp * kWarp * kTilePitch;
  if (last_batch) {
    for (int label = thread; label < kMaxLabels; label += kPaintThreads) labels[label] = 0;
    __syncthreads();
  }
  const int begin = args.things[0], end = args.things[1];
  const int64_t all_words = bitmap_words(args);
  for (int64_t first = (int64_t{blockIdx.x} * kPaintWarps + warp) * kWarp; first < all_words;
       first += int64_t{gridDim.x} * kPaintThreads) {
    const int64_t own_word = min(first + lane, all_words - 1), last_word = min(first + kWarp, all_words) - 1;
    const int first_row = static_cast<int>(first / args.row_words);
    const int last_row = static_cast<int>(last_word / args.row_words);
    const int row = static_cast<int>(own_word / args.row_words);
    const int word = static_cast<int>(own_word - int64_t{row} * args.row_words);
    unsigned int taken = 0;
    for (int base = begin; base < end; base += kWarp) {
      const int rank = base + lane < end ? args.placed[base + lane] : -1;
      bool near = false;
      if (rank >= 0) {
        const Window window = args.windows[rank];
        near = window.first_row <= last_row && first_row < window.first_row + window.rows;
      }
      for (unsigned int left = __ballot_sync(kAllLanes, near); left != 0; left &= left - 1) {
        const int i = __ffs(static_cast<int>(left)) - 1;
        const int its_rank = __shfl_sync(kAllLanes, rank, i);
        const Window window = args.windows[its_rank];
        const bool inside = row >= window.first_row && row < window.first_row + window.rows &&
                            word >= window.first_word && word < window.first_word + window.words;
        unsigned int fresh = 0;
        if (inside) fresh = args.bits[(its_rank - batch.begin) * all_words + own_word] & ~taken;
        taken |= fresh;
        for (; fresh != 0; fresh &= fresh - 1) {
          tile[lane * kTilePitch + __ffs(static_cast<int>(fresh)) - 1] = base + i + 1;
        }
      }
    }
    __syncwarp();
    for (int i = 0; i <= static_cast<int>(last_word - first); ++i) {
      const unsigned int taken_here = __shfl_sync(kAllLanes, taken, i);
      const int its_row = __shfl_sync(kAllLanes, row, i);
      const int x = __shfl_sync(kAllLanes, word, i) * kWarp + lane;
      if (x >= args.width) continue;
      const int64_t pixel = int64_t{its_row} * args.width + x;
      int32_t id = batch.begin > 0 ? args.panoptic[pixel] : 0;  // earlier batches come first
      if (id == 0 && (taken_here >> lane & 1) != 0) id = tile[i * kTilePitch + lane];
      if (id == 0 && last_batch) {
        const int64_t label = args.semantic[pixel];
        if (label > 0 && label < kMaxLabels) {
          atomicAdd(&labels[label], 1u);
          id = -static_cast<int32_t>(label);  // until fill_stuff finds the id of the label
        }
      }
      args.panoptic[pixel] = id;
    }
    __syncwarp();
  }
  if (!last_batch) return;
  __syncthreads();
  for (int label = thread; label < kMaxLabels; label += kPaintThreads) {
    if (labels[label] > 0) atomicAdd(args.label_areas + label, labels[label]);
  }
}

// Each block finds the ids of all labels; the first one writes the table.
__global__ void __launch_bounds__(kThreads) fill_stuff(MergeArguments args) {
  constexpr int kLabelsPerThread = kMaxLabels / kThreads;
  PANFPN_SHARED(int32_t, ids, kMaxLabels);
  PANFPN_SHARED(int, found_before, kThreads);
  // Each thread processes consecutive labels. A scan over the threads gives the number of labels that were
  // found before those.
  const int thread = static_cast<int>(threadIdx.x), first = thread * kLabelsPerThread;
  const int64_t things = args.things[1];
  int found = 0;
  for (int label = first; label < first + kLabelsPerThread; ++label) {
    const int64_t area = args.label_areas[label];
    found += area > 0 && area >= args.params.stuff_area_threshold ? 1 : 0;
  }
  found_before[thread] = found;
  __syncthreads();
  for (int reach = 1; reach < kThreads; reach *= 2) {
    const int left = thread >= reach ? found_before[thread - reach] : 0;
    __syncthreads();
    found_before[thread] += left;
    __syncthreads();
  }
  int64_t segment = things + found_before[thread] - found;
  for (int label = first; label < first + kLabelsPerThread; ++label) {
    const int64_t area = args.label_areas[label];
    const bool is_segment = area > 0 && area >= args.params.stuff_area_threshold;
    ids[label] = is_segment ? static_cast<int32_t>(segment + 1) : 0;
    if (!is_segment) continue;
    if (blockIdx.x == 0) write_row(args, segment, false, label, area, -1);
    ++segment;
  }
  if (blockIdx.x == 0) {
    const int64_t all = things + found_before[kThreads - 1];
    if (thread == 0) *args.segments = all;
    for (int64_t i = all + thread; args.pad && i < args.max_segments; i += kThreads) {
      int64_t* row = args.table + i * kSegmentColumns;
      row[0] = 0, row[1] = 0, row[2] = -1, row[3] = 0, row[4] = -1;
    }
  }
  __syncthreads();
  const int64_t pixels = int64_t{args.height} * args.width;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + thread; i < pixels; i += int64_t{gridDim.x} * kThreads) {
    const int32_t id = args.panoptic[i];
    if (id < 0) args.panoptic[i] = ids[-id];
  }
}

// Up to this number of instances, `plan` finds the order by comparing each score with all others.
constexpr int64_t kMostByCounting = 8192;
constexpr int64_t kBatchBytes = int64_t{64} << 20;  // bits of 500 instances on an image of 800 x 1333
constexpr int64_t kMostBlocks = 1024;               // in launches whose blocks take any amount of work
constexpr int kRasteriseBlocks = 16;                // for each instance

// Whether the bitmap of the image fits in the shared memory of `place`.
bool fits_in_shared(int64_t words) {
  constexpr size_t kStatic = kGroup * (sizeof(Candidate) + sizeof(int)) + 2 * kWave * sizeof(unsigned int);
  constexpr size_t kReserved = 1024;  // on newer GPUs the system takes this much, which ptxas may count
  return static_cast<size_t>(words) * sizeof(unsigned int) + kStatic + kReserved <= most_shared_bytes();
}

unsigned blocks_of(int64_t items, int64_t items_per_block, int64_t most) {
  return static_cast<unsigned>(std::min((items + items_per_block - 1) / items_per_block, most));
}

void launch_merge(const MergeArguments& args, int64_t batch_size, cudaStream_t stream) {
  const int64_t words = int64_t{args.height} * args.row_words;
  const size_t bitmap_bytes = static_cast<size_t>(words) * sizeof(unsigned int);
  const bool in_shared = fits_in_shared(words);
  PANFPN_LAUNCH(plan, dim3(std::max(blocks_of(args.count, kThreads, kMostBlocks), 1u)), dim3(kThreads), 0,
                stream, args);
  int64_t begin = 0;
  do {
    const int64_t end = std::min<int64_t>(begin + batch_size, args.count);
    const Batch batch{static_cast<int>(begin), static_cast<int>(end)};
    PANFPN_LAUNCH(rasterise, dim3(kRasteriseBlocks, blocks_of(end - begin, 1, 65535)), dim3(kThreads), 0,
                  stream, args, batch);
    PANFPN_LAUNCH(place, dim3(1), dim3(kPlaceThreads), in_shared ? bitmap_bytes : 0, stream, args, batch,
                  in_shared);
    PANFPN_LAUNCH(paint, dim3(blocks_of(words, kPaintThreads, kMostBlocks)), dim3(kPaintThreads), 0, stream,
                  args, batch, end == args.count);
    begin = end;
  } while (begin < args.count);
  PANFPN_LAUNCH(fill_stuff,
                dim3(std::max(blocks_of(int64_t{args.height} * args.width, kThreads * 8, kMostBlocks), 1u)),
                dim3(kThreads), 0, stream, args);
}

}  // namespace

Merged merge_segments(const MergeInputs& inputs, const MergeParams& params,
                      std::optional<int64_t> max_segments, const char* op) {
  STD_TORCH_CHECK(inputs.masks.scalar_type() == ScalarType::Float, op,
                  ": masks and boxes must be float32 on a GPU");
  const int64_t count = inputs.masks.size(0), height = inputs.semantic.size(0),
                width = inputs.semantic.size(1);
  constexpr int64_t kMost = int64_t{1} << 31;  // pixels and instances are counted in 32 bits
  STD_TORCH_CHECK(height < kMost && width < kMost && height * width < kMost, op, ": at most ", kMost - 1,
                  " pixels are supported on a GPU, got ", height, " x ", width);
  STD_TORCH_CHECK(count < kMost, op, ": at most ", kMost - 1, " instances are supported on a GPU, got ",
                  count);
  const DeviceGuard guard(inputs.masks.get_device_index());
  const Tensor masks = torch::stable::contiguous(inputs.masks),
               boxes = torch::stable::contiguous(inputs.boxes),
               scores = torch::stable::contiguous(inputs.scores),
               classes = torch::stable::contiguous(inputs.classes),
               semantic = torch::stable::contiguous(inputs.semantic);
  const bool sorted = count > kMostByCounting;
  const Tensor order = sorted ? argsort(negate(scores), /*descending=*/false) : classes;
  const int64_t rows = max_segments.value_or(count + kMaxLabels);
  Merged merged{empty({height, width}, ScalarType::Int, masks),
                empty({rows, kSegmentColumns}, ScalarType::Long, masks), empty({}, ScalarType::Long, masks)};

  const int64_t row_words = (width + kWarp - 1) / kWarp, words = height * row_words;
  const int64_t batch =
      std::clamp<int64_t>(kBatchBytes / std::max<int64_t>(4 * words, 1), 1, std::max<int64_t>(count, 1));
  const Tensor bits = empty({batch * words}, ScalarType::Int, masks);
  const bool keep_taken = batch < count || !fits_in_shared(words);
  const Tensor taken = empty({keep_taken ? words : 0}, ScalarType::Int, masks);
  constexpr int64_t kWindowInts = sizeof(Window) / sizeof(int);
  const Tensor scratch = empty({count * (kWindowInts + 3) + 2 + kMaxLabels}, ScalarType::Int, masks);
  int* const ints = scratch.mutable_data_ptr<int>();
  int* const areas = ints + count * kWindowInts;
  launch_merge(MergeArguments{masks.const_data_ptr<float>(),
                              boxes.const_data_ptr<float>(),
                              scores.const_data_ptr<float>(),
                              classes.const_data_ptr<int64_t>(),
                              sorted ? order.const_data_ptr<int64_t>() : nullptr,
                              Labels{semantic.const_data_ptr(), semantic.scalar_type()},
                              static_cast<int>(count),
                              static_cast<int>(masks.size(1)),
                              static_cast<int>(masks.size(2)),
                              static_cast<int>(height),
                              static_cast<int>(width),
                              static_cast<int>(row_words),
                              params,
                              reinterpret_cast<Window*>(ints),
                              reinterpret_cast<unsigned int*>(areas),
                              areas + count,
                              areas + 2 * count,
                              areas + 3 * count,
                              reinterpret_cast<unsigned int*>(areas + 3 * count + 2),
                              static_cast<unsigned int*>(bits.mutable_data_ptr()),
                              keep_taken ? static_cast<unsigned int*>(taken.mutable_data_ptr()) : nullptr,
                              merged.panoptic.mutable_data_ptr<int32_t>(),
                              merged.segments.mutable_data_ptr<int64_t>(),
                              merged.count.mutable_data_ptr<int64_t>(),
                              rows,
                              /*pad=*/max_segments.has_value()},
               batch, current_stream(masks));
  if (!max_segments.has_value()) {
    merged.segments = torch::stable::narrow(merged.segments, 0, 0, item_int64(merged.count));
  }
  return merged;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

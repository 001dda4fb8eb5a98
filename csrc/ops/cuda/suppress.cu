// Suppression entirely on the device, in three launches without a read-back: the order of the scores; a bit
// mask that says which box suppresses which, in the upper triangle of 64 x 64 tiles; and one block per image
// that walks through the mask in score order. blockIdx.y is the image, in the last kernel blockIdx.x.
#include "ops/suppress.h"

#include "ops/cuda/launch.cuh"
#include "ops/cuda/warp_reduce.cuh"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

constexpr int kTile = 64;  // boxes in a tile: the bits of one word of the mask
constexpr int kWarp = 32;
constexpr unsigned int kAllLanes = 0xFFFFFFFFu;

// Up to this number of boxes, the order is found by counting the scores that precede each score. This is
// quadratic, but it runs on all multiprocessors at once, in one launch and without scratch memory. Sorting
// launches several kernels one after the other, and for small inputs the launches dominate.
constexpr int64_t kMostByCounting = 8192;
constexpr int kRankThreads = 256;
constexpr int kRanksPerWarp = 4;  // scores that share one pass over all the others
constexpr int kRanksPerBlock = kRankThreads / kWarp * kRanksPerWarp;

// order[rank] = index. Equal keys rank by index, so all ranks differ.
template <typename T>
__global__ void __launch_bounds__(kRankThreads)
    rank_scores(const T* all_scores, int64_t count, int64_t* all_order) {
  const T* scores = all_scores + blockIdx.y * count;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int boxes = static_cast<int>(count);
  const int first = (static_cast<int>(blockIdx.x) * (kRankThreads / kWarp) + warp) * kRanksPerWarp;
  if (first >= boxes) return;
  sort_key_t<T> keys[kRanksPerWarp];
  unsigned int before[kRanksPerWarp];
  PANFPN_UNROLL
  for (int k = 0; k < kRanksPerWarp; ++k) {
    keys[k] = descending_key(scores[first + k < boxes ? first + k : first]);
    before[k] = 0;
  }
  PANFPN_UNROLL_BY(2)
  for (int i = lane; i < boxes; i += kWarp) {
    const sort_key_t<T> key = descending_key(scores[i]);
    PANFPN_UNROLL
    for (int k = 0; k < kRanksPerWarp; ++k) {
      before[k] += key < keys[k] || (key == keys[k] && i < first + k) ? 1 : 0;
    }
  }
  PANFPN_UNROLL
  for (int k = 0; k < kRanksPerWarp; ++k) {
    const unsigned int rank = warp_sum(before[k]);
    if (lane == k && first + k < boxes) all_order[blockIdx.y * count + rank] = first + k;
  }
}

constexpr int kKeyThreads = 256;

template <typename T>
using signed_key_t = std::make_signed_t<sort_key_t<T>>;

// keys[i]: sorts as descending_key does, but is signed, as torch's integers are.
template <typename T>
__global__ void __launch_bounds__(kKeyThreads)
    find_keys(const T* scores, int64_t count, signed_key_t<T>* keys) {
  const int64_t i = int64_t{blockIdx.x} * kKeyThreads + threadIdx.x;
  if (i >= count) return;
  constexpr sort_key_t<T> kSign = sort_key_t<T>{1} << (8 * sizeof(T) - 1);
  keys[i] = static_cast<signed_key_t<T>>(descending_key(scores[i]) ^ kSign);
}

constexpr int kLanesPerRow = 4;  // neighbouring lanes that share one row of a tile
constexpr int kMaskThreads = kTile * kLanesPerRow;

// mask[image, row, word]: the boxes of tile `word` that the box at position `row` in the order suppresses.
// Words to the left of the diagonal are neither written nor read. `all_groups` may be null.
template <typename T>
__global__ void __launch_bounds__(kMaskThreads)
    suppression_mask(const Box<T>* all_boxes, const int64_t* all_groups, const int64_t* all_order,
                     int64_t count, T threshold, uint64_t* all_mask) {
  const int64_t words = (count + kTile - 1) / kTile;
  const int64_t triangle = blockIdx.x;
  // Column c of the triangle starts at c * (c + 1) / 2; the square root may be off by one.
  int64_t column_tile = static_cast<int64_t>(sqrtf(2.0f * static_cast<float>(triangle) + 0.25f) - 0.5f);
  while (column_tile * (column_tile + 1) / 2 > triangle) --column_tile;
  while ((column_tile + 1) * (column_tile + 2) / 2 <= triangle) ++column_tile;
  const int64_t row_tile = triangle - column_tile * (column_tile + 1) / 2;

  const int64_t image = blockIdx.y;
  const Box<T>* boxes = all_boxes + image * count;
  const int64_t* groups = all_groups != nullptr ? all_groups + image * count : nullptr;
  const int64_t* order = all_order + image * count;
  PANFPN_SHARED(Box<T>, tile, kTile);
  PANFPN_SHARED(T, tile_areas, kTile);
  PANFPN_SHARED(int64_t, tile_groups, kTile);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kTile && column_tile * kTile + thread < count) {
    const int64_t index = order[column_tile * kTile + thread];
    const Box<T> box = boxes[index];
    tile[thread] = box;
    tile_areas[thread] = box_area(box);
    tile_groups[thread] = groups != nullptr ? groups[index] : 0;
  }
  __syncthreads();

  const int in_tile = thread / kLanesPerRow, part = thread % kLanesPerRow;
  const int64_t row = row_tile * kTile + in_tile;
  uint64_t bits = 0;
  if (row < count) {
    const int64_t index = order[row];
    const Box<T> box = boxes[index];
    const T area = box_area(box);
    const int64_t group = groups != nullptr ? groups[index] : 0;
    const int64_t left = count - column_tile * kTile;
    const int columns = left < kTile ? static_cast<int>(left) : kTile;
    const int after = column_tile == row_tile ? in_tile : -1;  // a box suppresses only boxes behind it
    for (int i = part; i < columns; i += kLanesPerRow) {
      if (i > after && tile_groups[i] == group && iou_above(box, area, tile[i], tile_areas[i], threshold)) {
        bits |= uint64_t{1} << i;
      }
    }
  }
  PANFPN_UNROLL
  for (int other = 1; other < kLanesPerRow; other *= 2) {
    bits |= __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(bits), other);
  }
  if (row < count && part == 0) all_mask[(image * count + row) * words + column_tile] = bits;
}

constexpr int kMostResolveThreads = 1024;
constexpr int64_t kFewWords = 64;  // up to this number of words, half the threads suffice

__device__ __forceinline__ int rank_of(uint64_t bits, int bit) {
  return __popcll(bits & ((uint64_t{1} << bit) - 1));
}

// One block per image walks through the tiles in score order. The first warp decides the boxes of a tile
// among themselves. Meanwhile the other warps mark the boxes of later tiles that the previous tile
// suppresses. The first warp has already fetched the words with which the previous tile suppresses boxes of
// the current one. `keep` receives original indices.
__global__ void __launch_bounds__(kMostResolveThreads)
    resolve_suppression(const uint64_t* all_mask, const int64_t* all_order, int64_t count, int64_t max_output,
                        int64_t* all_keep, int64_t* all_kept_counts) {
  const int64_t words = (count + kTile - 1) / kTile;
  const int64_t image = blockIdx.x;
  const uint64_t* mask = all_mask + image * count * words;
  const int64_t* order = all_order + image * count;
  int64_t* keep = all_keep + image * max_output;
  PANFPN_DYNAMIC_SHARED(unsigned int, removed);  // two halves of each word
  PANFPN_SHARED(uint64_t, alive_in, 2);          // of this tile and of the previous one, alternating
  PANFPN_SHARED(int64_t, kept_until, 2);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp, warp = thread / kWarp, pushers = threads / kWarp - 1;
  for (int64_t i = thread; i < 2 * words; i += threads) removed[i] = 0;
  __syncthreads();

  // The word `word` of this lane's two rows of a tile.
  auto fetch = [&](int64_t tile, int half, int64_t word) {
    const int64_t row = tile * kTile + half * kWarp + lane;
    return row < count && word < words ? mask[row * words + word] : uint64_t{0};
  };
  // The original index of this lane's boxes of a tile.
  auto fetch_index = [&](int64_t tile, int half) {
    const int64_t row = tile * kTile + half * kWarp + lane;
    return row < count ? order[row] : int64_t{0};
  };
  // Used by the first warp: the words on the diagonal of both rows, the words above it from the previous
  // tile, and the original indices. All are fetched a tile ahead, so that no tile waits for memory.
  uint64_t diagonal[2] = {0, 0}, above[2] = {0, 0};
  int64_t indices[2] = {0, 0};
  uint64_t alive_before = 0;
  if (warp == 0) {
    diagonal[0] = fetch(0, 0, 0), diagonal[1] = fetch(0, 1, 0);
    indices[0] = fetch_index(0, 0), indices[1] = fetch_index(0, 1);
  }
  auto suppressed_by = [&](uint64_t alive, const uint64_t (&rows)[2]) {
    const uint64_t mine =
        ((alive >> lane & 1) != 0 ? rows[0] : 0) | ((alive >> (lane + kWarp) & 1) != 0 ? rows[1] : 0);
    const unsigned int low = warp_or(static_cast<unsigned int>(mine));
    const unsigned int high = warp_or(static_cast<unsigned int>(mine >> 32));
    return static_cast<uint64_t>(high) << 32 | low;
  };

  int64_t total = 0;
  for (int64_t tile = 0; tile < words && total < max_output; ++tile) {
    const int turn = static_cast<int>(tile % 2);
    if (warp == 0) {
      const uint64_t next_diagonal[2] = {fetch(tile + 1, 0, tile + 1), fetch(tile + 1, 1, tile + 1)};
      const uint64_t next_above[2] = {fetch(tile, 0, tile + 1), fetch(tile, 1, tile + 1)};
      const int64_t next_indices[2] = {fetch_index(tile + 1, 0), fetch_index(tile + 1, 1)};
      const int64_t left = count - tile * kTile;
      const uint64_t all = left < kTile ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
      const uint64_t gone = static_cast<uint64_t>(removed[2 * tile + 1]) << 32 | removed[2 * tile];
      const uint64_t open = all & ~gone & ~suppressed_by(alive_before, above);
      // Rows suppress later bits only, so each round fixes at least one more bit, and usually one link of all
      // chains at once. The state that no round changes is the only solution.
      uint64_t alive = open, previous;
      do {
        previous = alive;
        alive = open & ~suppressed_by(previous, diagonal);
      } while (alive != previous);
      PANFPN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int bit = half * kWarp + lane;
        const int64_t position = total + rank_of(alive, bit);
        if ((alive >> bit & 1) != 0 && position < max_output) keep[position] = indices[half];
      }
      if (lane == 0) {
        alive_in[turn] = alive;
        kept_until[turn] = total + __popcll(alive);
      }
      alive_before = alive;
      diagonal[0] = next_diagonal[0], diagonal[1] = next_diagonal[1];
      above[0] = next_above[0], above[1] = next_above[1];
      indices[0] = next_indices[0], indices[1] = next_indices[1];
    } else if (tile > 0) {
      const uint64_t alive = alive_in[1 - turn];
      for (int bit = warp - 1; bit < kTile; bit += pushers) {
        if ((alive >> bit & 1) == 0) continue;
        const unsigned int* row =
            reinterpret_cast<const unsigned int*>(mask + ((tile - 1) * kTile + bit) * words);
        PANFPN_UNROLL_BY(4)
        for (int64_t i = 2 * (tile + 1) + lane; i < 2 * words; i += kWarp) {
          const unsigned int suppressed = row[i];
          if (suppressed != 0) atomicOr(&removed[i], suppressed);
        }
      }
    }
    __syncthreads();
    total = kept_until[turn];
  }
  const int64_t kept = total < max_output ? total : max_output;
  for (int64_t i = kept + thread; i < max_output; i += threads) keep[i] = -1;
  if (thread == 0) all_kept_counts[image] = kept;
}

// The number of tiles for which resolve_suppression's shared memory fits in a block: on GPUs with the least
// shared memory (sm_75), half a million boxes, whose mask takes 32 GiB.
int64_t most_tiles() {
  constexpr size_t kStatic = 2 * sizeof(uint64_t) + 2 * sizeof(int64_t);  // alive_in and kept_until
  return static_cast<int64_t>((most_shared_bytes() - kStatic) / sizeof(uint64_t));
}

constexpr int64_t kAlwaysTiles = 4096;  // these fit on every GPU
constexpr int64_t kMostImages = 65535;  // the largest grid dimension along y

// Sorts keys instead of scores, so that both ways give the same order of NaN: the sort of a GPU may place a
// NaN by its sign.
Tensor order_by_sorting(const Tensor& scores, int64_t count) {
  Tensor keys = torch::stable::new_empty(
      scores, scores.sizes(), scores.scalar_type() == ScalarType::Float ? ScalarType::Int : ScalarType::Long);
  dispatch_float_or_double(scores.scalar_type(), "nms", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto blocks = static_cast<unsigned>((count + kKeyThreads - 1) / kKeyThreads);
    PANFPN_LAUNCH(find_keys<T>, dim3(blocks), dim3(kKeyThreads), 0, current_stream(scores),
                  scores.const_data_ptr<T>(), count, static_cast<signed_key_t<T>*>(keys.mutable_data_ptr()));
  });
  return torch::stable::contiguous(argsort(keys, /*descending=*/false, keys.dim() - 1));
}

Tensor order_of(const Tensor& scores_in, int64_t images, int64_t count) {
  const Tensor scores = torch::stable::contiguous(scores_in);
  if (count > kMostByCounting) return order_by_sorting(scores, count * images);
  const Tensor order = empty({images, count}, ScalarType::Long, scores);
  const dim3 grid(static_cast<unsigned>((count + kRanksPerBlock - 1) / kRanksPerBlock),
                  static_cast<unsigned>(images));
  dispatch_float_or_double(scores.scalar_type(), "nms", [&](auto tag) {
    using T = typename decltype(tag)::type;
    PANFPN_LAUNCH(rank_scores<T>, grid, dim3(kRankThreads), 0, current_stream(scores),
                  scores.const_data_ptr<T>(), count, order.mutable_data_ptr<int64_t>());
  });
  return order;
}

}  // namespace

std::pair<Tensor, Tensor> suppress(const Tensor& boxes_in, const Tensor& scores, const Tensor* idxs,
                                   double iou_threshold, int64_t max_output) {
  const bool batched = boxes_in.dim() == 3;
  const int64_t images = batched ? boxes_in.size(0) : 1, count = boxes_in.size(batched ? 1 : 0);
  const int64_t words = (count + kTile - 1) / kTile;
  STD_TORCH_CHECK(images <= kMostImages, "nms: at most ", kMostImages,
                  " images are supported in a batch, got ", images);
  const DeviceGuard guard(boxes_in.get_device_index());
  if (words > kAlwaysTiles) {
    const int64_t most = most_tiles() * kTile;
    STD_TORCH_CHECK(count <= most, "nms: at most ", most, " boxes are supported on this GPU, got ", count);
  }
  const Tensor boxes = torch::stable::contiguous(boxes_in);
  const Tensor groups = idxs != nullptr ? torch::stable::contiguous(*idxs) : boxes;
  const Tensor order = order_of(scores, images, count);
  const Tensor mask = empty({images, count, words}, ScalarType::Long, boxes);
  const auto [keep, kept_counts] = empty_padded(boxes, max_output);
  const auto stream = current_stream(boxes);
  uint64_t* mask_data = static_cast<uint64_t*>(mask.mutable_data_ptr());
  dispatch_float_or_double(boxes.scalar_type(), "nms", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(words * (words + 1) / 2), static_cast<unsigned>(images));
    PANFPN_LAUNCH(suppression_mask<T>, grid, dim3(kMaskThreads), 0, stream,
                  static_cast<const Box<T>*>(boxes.const_data_ptr()),
                  idxs != nullptr ? groups.const_data_ptr<int64_t>() : nullptr,
                  order.const_data_ptr<int64_t>(), count, static_cast<T>(iou_threshold), mask_data);
  });
  const int threads = words <= kFewWords ? kMostResolveThreads / 2 : kMostResolveThreads;
  PANFPN_LAUNCH(resolve_suppression, dim3(static_cast<unsigned>(images)), dim3(threads),
                words * sizeof(uint64_t), stream, mask_data, order.const_data_ptr<int64_t>(), count,
                max_output, keep.mutable_data_ptr<int64_t>(), kept_counts.mutable_data_ptr<int64_t>());
  return {keep, kept_counts};
}

Tensor suppress_all(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  auto [keep, kept_count] = suppress(boxes, scores, idxs, iou_threshold, boxes.size(0));
  return torch::stable::narrow(keep, 0, 0, item_int64(kept_count));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// Suppression wholly on the device: a bit mask of who strikes whom in 64 x 64 tiles, upper triangle only,
// then one block that walks it in score order. The host reads one number, how many boxes were kept.
#include "ops/cuda/suppress.h"

namespace panfpn {
namespace {

constexpr int kTile = 64;  // boxes in a tile: the bits of one mask word

// mask[i, word]: which boxes of tile `word` box i strikes. Boxes are in score order. `groups` may be null.
template <typename T>
__global__ void __launch_bounds__(kTile)
    suppression_mask(const Box<T>* boxes, const int64_t* groups, int64_t count, T threshold, uint64_t* mask) {
  const int64_t words = (count + kTile - 1) / kTile;
  const int64_t row_tile = blockIdx.y, column_tile = blockIdx.x;
  if (column_tile < row_tile) return;

  PANFPN_SHARED(Box<T>, tile, kTile);
  PANFPN_SHARED(int64_t, tile_groups, kTile);
  const int64_t column = column_tile * kTile + threadIdx.x;
  if (column < count) {
    tile[threadIdx.x] = boxes[column];
    if (groups != nullptr) tile_groups[threadIdx.x] = groups[column];
  }
  __syncthreads();

  const int64_t row = row_tile * kTile + threadIdx.x;
  if (row >= count) return;
  const Box<T> box = boxes[row];
  const int64_t group = groups != nullptr ? groups[row] : 0;
  const int64_t left = count - column_tile * kTile;
  const int columns = left < kTile ? static_cast<int>(left) : kTile;
  uint64_t bits = 0;
  for (int i = column_tile == row_tile ? static_cast<int>(threadIdx.x) + 1 : 0; i < columns; ++i) {
    if ((groups == nullptr || tile_groups[i] == group) && iou_above(box, tile[i], threshold)) {
      bits |= uint64_t{1} << i;
    }
  }
  mask[row * words + column_tile] = bits;
}

constexpr int kResolveThreads = 256;

// One block. Tile by tile: one thread settles the 64 boxes among themselves, then all threads strike out what
// the kept ones reach in later tiles. `removed` [words] starts as zeros; `keep` receives original indices.
__global__ void __launch_bounds__(kResolveThreads)
    resolve_suppression(const uint64_t* mask, const int64_t* order, int64_t count, uint64_t* removed,
                        int64_t* keep, int64_t* kept_count) {
  const int64_t words = (count + kTile - 1) / kTile;
  PANFPN_SHARED(uint64_t, diagonal, kTile);
  PANFPN_SHARED(uint64_t, kept, 1);
  const int thread = static_cast<int>(threadIdx.x);
  int64_t total = 0;
  for (int64_t tile = 0; tile < words; ++tile) {
    const int64_t first = tile * kTile;
    const int size = count - first < kTile ? static_cast<int>(count - first) : kTile;
    if (thread < size) diagonal[thread] = mask[(first + thread) * words + tile];
    __syncthreads();
    if (thread == 0) {
      uint64_t gone = removed[tile], alive = 0;
      for (int i = 0; i < size; ++i) {
        if ((gone >> i & 1) == 0) {
          alive |= uint64_t{1} << i;
          gone |= diagonal[i];
        }
      }
      kept[0] = alive;
    }
    __syncthreads();
    const uint64_t alive = kept[0];
    if (thread < size && (alive >> thread & 1) != 0) {
      const uint64_t before = alive & ((uint64_t{1} << thread) - 1);
      keep[total + __popcll(before)] = order[first + thread];
    }
    total += __popcll(alive);
    for (int64_t word = tile + 1 + thread; word < words; word += kResolveThreads) {
      uint64_t struck = removed[word];
      for (uint64_t rest = alive; rest != 0; rest &= rest - 1) {
        struck |= mask[(first + __ffsll(static_cast<long long>(rest)) - 1) * words + word];
      }
      removed[word] = struck;
    }
    __syncthreads();  // before the next tile reads `removed` and overwrites `diagonal` and `kept`
  }
  if (thread == 0) *kept_count = total;
}

// The largest grid dimension along y; boxes beyond 64 times this would need a mask of more than 64 GiB.
constexpr int64_t kMaxTiles = 65535;

}  // namespace

Tensor suppress(const Tensor& boxes_in, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  const int64_t count = boxes_in.size(0), words = (count + kTile - 1) / kTile;
  STD_TORCH_CHECK(words <= kMaxTiles, "nms: at most ", kMaxTiles * kTile, " boxes fit on a GPU, got ", count);
  if (count == 0) return empty({0}, ScalarType::Long, boxes_in);
  const DeviceGuard guard(boxes_in.get_device_index());
  const Tensor order = argsort(scores, /*descending=*/true);
  const Tensor boxes = index_select(torch::stable::contiguous(boxes_in), order);
  const Tensor groups = idxs != nullptr ? index_select(*idxs, order) : order;

  const Tensor mask = empty({count, words}, ScalarType::Long, boxes);
  Tensor removed = empty({words}, ScalarType::Long, boxes);
  torch::stable::zero_(removed);
  Tensor keep = empty({count}, ScalarType::Long, boxes);
  const Tensor kept_count = empty({1}, ScalarType::Long, boxes);
  const auto stream = current_stream(boxes);
  uint64_t* mask_data = static_cast<uint64_t*>(mask.mutable_data_ptr());
  dispatch_float_or_double(boxes.scalar_type(), "nms", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(words), static_cast<unsigned>(words));
    PANFPN_LAUNCH(suppression_mask<T>, grid, dim3(kTile), 0, stream,
                  static_cast<const Box<T>*>(boxes.const_data_ptr()),
                  idxs != nullptr ? groups.const_data_ptr<int64_t>() : nullptr, count,
                  static_cast<T>(iou_threshold), mask_data);
  });
  PANFPN_LAUNCH(resolve_suppression, dim3(1), dim3(kResolveThreads), 0, stream, mask_data,
                order.const_data_ptr<int64_t>(), count, static_cast<uint64_t*>(removed.mutable_data_ptr()),
                keep.mutable_data_ptr<int64_t>(), kept_count.mutable_data_ptr<int64_t>());
  return torch::stable::narrow(keep, 0, 0, item_int64(kept_count));
}

}  // namespace panfpn

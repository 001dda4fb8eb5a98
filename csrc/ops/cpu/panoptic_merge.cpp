// Instances are processed in score order. Each is evaluated once, within its box, into a scratch bitmap,
// while its area and its overlap with earlier instances are counted; then its id is written to the pixels
// that are still free. The remaining free pixels are stuff: one pass counts their labels, another writes the
// ids of labels with enough pixels.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

#include "ops/cpu/mask_window.h"
#include "ops/cpu/simd.h"
#include "ops/panoptic_merge.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// Pixels per task. Instances are small and many, and each waits for the previous one, so only large ones are
// worth waking other threads.
constexpr int64_t kGrainPixels = int64_t{1} << 18;
constexpr int64_t kStuffGrainPixels = int64_t{1} << 16;

using SegmentRow = std::array<int64_t, kSegmentColumns>;

constexpr SegmentRow kNoSegment{0, 0, -1, 0, -1};

struct Map {
  int32_t* ids;
  int64_t height, width;
};

// `taken` is 1 where the id in the map is not zero, so that counting and claiming read bytes instead of
// integers.
struct Claims {
  Map map;
  std::vector<uint8_t> taken, scratch;
};

struct Counts {
  int64_t area, claimed;
};

PANFPN_VECTOR_CLONES Counts count_line(const uint8_t* bits, const uint8_t* taken, int64_t width) {
  int64_t area = 0, claimed = 0;
  // Bytes are summed in 32 bits, which a block of a row cannot overflow.
  constexpr int64_t kBlock = int64_t{1} << 20;
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const int64_t end = std::min(width, begin + kBlock);
    uint32_t block_area = 0, block_claimed = 0;
    for (int64_t i = begin; i < end; ++i) {
      block_area += bits[i];
      block_claimed += static_cast<uint8_t>(bits[i] & taken[i]);
    }
    area += block_area;
    claimed += block_claimed;
  }
  return {area, claimed};
}

PANFPN_VECTOR_CLONES void claim_line(const uint8_t* bits, uint8_t* taken, int32_t* ids, int32_t id,
                                     int64_t width) {
  for (int64_t i = 0; i < width; ++i) ids[i] = bits[i] > taken[i] ? id : ids[i];
  for (int64_t i = 0; i < width; ++i) taken[i] = static_cast<uint8_t>(taken[i] | bits[i]);
}

// Claims the free pixels of one instance for `id` and returns their number, or 0 if the instance is empty or
// overlaps too much.
template <typename A>
int64_t claim_instance(Claims& claims, const MaskWindow<A>& window, const MergeParams& params, int32_t id) {
  if (window.empty()) return 0;
  const Range rows = window.lines();
  const int64_t left = window.across().begin, width = window.across().size();
  const int64_t map_width = claims.map.width;
  std::vector<uint8_t>& scratch = claims.scratch;
  scratch.resize(std::max(scratch.size(), static_cast<size_t>(rows.size() * width)));
  const int64_t grain = std::max<int64_t>(1, kGrainPixels / width);

  std::atomic<int64_t> all_area{0}, all_claimed{0};
  torch::stable::parallel_for(rows.begin, rows.end, grain, [&](int64_t begin, int64_t end) {
    LineCursor<A> cursor(window);
    Counts sum{0, 0};
    for (int64_t y = begin; y < end; ++y) {
      uint8_t* bits = scratch.data() + (y - rows.begin) * width;
      cursor.write(y, bits);
      const Counts line = count_line(bits, claims.taken.data() + y * map_width + left, width);
      sum = {sum.area + line.area, sum.claimed + line.claimed};
    }
    all_area += sum.area;
    all_claimed += sum.claimed;
  });
  const int64_t area = all_area, claimed = all_claimed;
  if (area == claimed || overlaps_too_much(claimed, area, params)) return 0;

  torch::stable::parallel_for(rows.begin, rows.end, grain, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      const int64_t at = y * map_width + left;
      claim_line(scratch.data() + (y - rows.begin) * width, claims.taken.data() + at, claims.map.ids + at, id,
                 width);
    }
  });
  return area - claimed;
}

template <typename A>
void merge_things(const Map& map, const Tensor& masks, const Tensor& boxes, const Tensor& scores,
                  const Tensor& classes, const MergeParams& params, std::vector<SegmentRow>& table) {
  const Tensor order_tensor = argsort(negate(scores), /*descending=*/false);  // NaN last, as in detectron2
  const int64_t* order = order_tensor.const_data_ptr<int64_t>();
  const int64_t mask_height = masks.size(1), mask_width = masks.size(2);
  const PixelRule<A> rule{static_cast<A>(params.mask_threshold), false};
  Claims claims{map, std::vector<uint8_t>(static_cast<size_t>(map.height * map.width)), {}};
  for (int64_t rank = 0; rank < masks.size(0); ++rank) {
    const int64_t n = order[rank];
    const Placement turn = placement(scores.const_data_ptr<float>()[n], params);
    if (turn == Placement::stop) break;
    if (turn == Placement::skip) continue;
    const MaskWindow<A> window(Scan::rows, masks.const_data_ptr<A>() + n * mask_height * mask_width,
                               mask_height, mask_width, boxes.const_data_ptr<A>() + n * 4, map.height,
                               map.width, rule);
    const int64_t id = static_cast<int64_t>(table.size()) + 1;
    const int64_t area = claim_instance(claims, window, params, static_cast<int32_t>(id));
    if (area > 0) table.push_back({id, 1, classes.const_data_ptr<int64_t>()[n], area, n});
  }
}

// Returns whether a pixel is free and has a stuff label.
template <typename L>
PANFPN_ALWAYS_INLINE bool is_stuff(int32_t id, L label) {
  return id == 0 && label > 0 && static_cast<int64_t>(label) < kMaxLabels;
}

// Returns the end of the run of free pixels with one label that begins at `i`. Label maps are smooth, so runs
// are long; they are searched in steps that compile to vector comparisons.
template <typename L>
PANFPN_ALWAYS_INLINE int64_t run_end(const int32_t* ids, const L* semantic, int64_t i, int64_t end) {
  const L label = semantic[i];
  constexpr int64_t kStep = 32;
  for (; i + kStep <= end; i += kStep) {
    int32_t taken = 0;
    L different = 0;
    for (int64_t j = 0; j < kStep; ++j) taken |= ids[i + j];
    for (int64_t j = 0; j < kStep; ++j) different = static_cast<L>(different | (semantic[i + j] ^ label));
    if (taken != 0 || different != 0) break;
  }
  while (i < end && ids[i] == 0 && semantic[i] == label) ++i;
  return i;
}

template <typename L>
PANFPN_VECTOR_CLONES void count_labels(const int32_t* ids, const L* semantic, int64_t begin, int64_t end,
                                       int64_t* areas) {
  for (int64_t i = begin; i < end;) {
    if (!is_stuff(ids[i], semantic[i])) {
      ++i;
      continue;
    }
    const int64_t first = i;
    i = run_end(ids, semantic, first, end);
    areas[semantic[first]] += i - first;
  }
}

template <typename L>
PANFPN_VECTOR_CLONES void write_labels(int32_t* ids, const L* semantic, int64_t begin, int64_t end,
                                       const int32_t* id_of_label) {
  for (int64_t i = begin; i < end;) {
    if (!is_stuff(ids[i], semantic[i])) {
      ++i;
      continue;
    }
    const int64_t first = i;
    i = run_end(ids, semantic, first, end);
    std::fill(ids + first, ids + i, id_of_label[semantic[first]]);
  }
}

template <typename L>
void fill_stuff(const Map& map, const L* semantic, const MergeParams& params,
                std::vector<SegmentRow>& table) {
  const int64_t pixels = map.height * map.width;
  std::vector<int64_t> areas(kMaxLabels, 0);
  std::mutex areas_mutex;
  torch::stable::parallel_for(0, pixels, kStuffGrainPixels, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> local(kMaxLabels, 0);
    count_labels(map.ids, semantic, begin, end, local.data());
    const std::lock_guard<std::mutex> lock(areas_mutex);
    for (int64_t label = 1; label < kMaxLabels; ++label) areas[label] += local[label];
  });

  std::vector<int32_t> id_of_label(kMaxLabels, 0);
  for (int64_t label = 1; label < kMaxLabels; ++label) {
    if (areas[label] == 0 || areas[label] < params.stuff_area_threshold) continue;
    const int64_t id = static_cast<int64_t>(table.size()) + 1;
    id_of_label[label] = static_cast<int32_t>(id);
    table.push_back({id, 0, label, areas[label], -1});
  }
  torch::stable::parallel_for(0, pixels, kStuffGrainPixels, [&](int64_t begin, int64_t end) {
    write_labels(map.ids, semantic, begin, end, id_of_label.data());
  });
}

void fill_stuff_of_any_dtype(const Map& map, const Tensor& semantic, const MergeParams& params,
                             std::vector<SegmentRow>& table) {
  switch (semantic.scalar_type()) {
    case ScalarType::Byte:
      return fill_stuff(map, semantic.const_data_ptr<uint8_t>(), params, table);
    case ScalarType::Short:
      return fill_stuff(map, semantic.const_data_ptr<int16_t>(), params, table);
    case ScalarType::Int:
      return fill_stuff(map, semantic.const_data_ptr<int32_t>(), params, table);
    default:
      return fill_stuff(map, semantic.const_data_ptr<int64_t>(), params, table);
  }
}

}  // namespace

Merged merge_segments(const MergeInputs& inputs, const MergeParams& params,
                      std::optional<int64_t> max_segments, const char* op) {
  const Tensor masks = torch::stable::contiguous(inputs.masks),
               boxes = torch::stable::contiguous(inputs.boxes),
               scores = torch::stable::contiguous(inputs.scores),
               classes = torch::stable::contiguous(inputs.classes),
               semantic = torch::stable::contiguous(inputs.semantic);
  Tensor panoptic = empty({semantic.size(0), semantic.size(1)}, ScalarType::Int, masks);
  torch::stable::zero_(panoptic);
  const Map map{panoptic.mutable_data_ptr<int32_t>(), semantic.size(0), semantic.size(1)};
  std::vector<SegmentRow> table;  // every segment has pixels
  dispatch_float_or_double(masks.scalar_type(), op, [&](auto tag) {
    merge_things<typename decltype(tag)::type>(map, masks, boxes, scores, classes, params, table);
  });
  fill_stuff_of_any_dtype(map, semantic, params, table);

  Tensor count = empty({}, ScalarType::Long, masks);
  *count.mutable_data_ptr<int64_t>() = static_cast<int64_t>(table.size());
  table.resize(static_cast<size_t>(max_segments.value_or(static_cast<int64_t>(table.size()))), kNoSegment);
  Tensor segments = empty({static_cast<int64_t>(table.size()), kSegmentColumns}, ScalarType::Long, masks);
  int64_t* out = segments.mutable_data_ptr<int64_t>();
  for (const SegmentRow& row : table) out = std::copy(row.begin(), row.end(), out);
  return {panoptic, segments, count};
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

// The map itself records who claimed a pixel. Instances come in score order; each is evaluated once within
// its box into a scratch bitmap while its area and the part that others hold are counted, then written where
// the pixel is still free. What stays free is stuff: one pass counts its labels, one writes the ids of those
// that are large enough.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <tuple>
#include <vector>

#include "ops/cpu/mask_window.h"
#include "ops/panoptic_merge.h"

namespace panfpn {
namespace {

constexpr int64_t kGrainPixels = 16384;  // per task

using SegmentRow = std::array<int64_t, kSegmentColumns>;

struct Map {
  int32_t* ids;
  int64_t height, width;
};

// Claims the free pixels of one instance for `id` and returns how many; 0 where it is empty or too much
// overlapped.
template <typename A>
int64_t claim_instance(const Map& map, const MaskWindow<A>& window, const MergeParams& params, int32_t id,
                       std::vector<uint8_t>& scratch) {
  const PixelRange rows = window.rows();
  const int64_t width = window.width(), left = window.columns().begin;
  if (rows.begin == rows.end || width == 0) return 0;
  scratch.resize(std::max<size_t>(scratch.size(), (rows.end - rows.begin) * width));
  const int64_t grain = std::max<int64_t>(1, kGrainPixels / width);
  const A threshold = static_cast<A>(params.mask_threshold);

  std::atomic<int64_t> area{0}, claimed{0};
  torch::stable::parallel_for(rows.begin, rows.end, grain, [&](int64_t begin, int64_t end) {
    int64_t local_area = 0, local_claimed = 0;
    for (int64_t y = begin; y < end; ++y) {
      uint8_t* bits = scratch.data() + (y - rows.begin) * width;
      const int32_t* line = map.ids + y * map.width + left;
      window.for_row(y, [&](int64_t i, A value) {
        const bool on = value >= threshold;
        bits[i] = on;
        local_area += on;
        local_claimed += on && line[i] != 0;
      });
    }
    area += local_area;
    claimed += local_claimed;
  });
  if (area == 0 || overlaps_too_much(claimed, area, params.overlap_threshold)) return 0;

  torch::stable::parallel_for(rows.begin, rows.end, grain, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      const uint8_t* bits = scratch.data() + (y - rows.begin) * width;
      int32_t* line = map.ids + y * map.width + left;
      for (int64_t i = 0; i < width; ++i) line[i] = bits[i] != 0 && line[i] == 0 ? id : line[i];
    }
  });
  return area - claimed;
}

template <typename A>
void merge_things(const Map& map, const Tensor& masks, const Tensor& boxes, const Tensor& scores,
                  const Tensor& classes, const MergeParams& params, std::vector<SegmentRow>& table) {
  const Tensor order_tensor = argsort(negate(scores), /*descending=*/false);  // NaN last, as detectron2
  const int64_t* order = order_tensor.const_data_ptr<int64_t>();
  const int64_t mask_height = masks.size(1), mask_width = masks.size(2);
  std::vector<uint8_t> scratch;
  for (int64_t rank = 0; rank < masks.size(0); ++rank) {
    const int64_t n = order[rank];
    if (static_cast<double>(scores.const_data_ptr<float>()[n]) < params.score_threshold) break;
    const MaskWindow<A> window(masks.const_data_ptr<A>() + n * mask_height * mask_width, mask_height,
                               mask_width, boxes.const_data_ptr<A>() + n * 4, map.height, map.width,
                               /*whole_image=*/params.mask_threshold <= 0);
    const int64_t id = static_cast<int64_t>(table.size()) + 1;
    const int64_t area = claim_instance(map, window, params, static_cast<int32_t>(id), scratch);
    if (area > 0) table.push_back({id, 1, classes.const_data_ptr<int64_t>()[n], area, n});
  }
}

template <typename L>
void fill_stuff(const Map& map, const L* semantic, const MergeParams& params,
                std::vector<SegmentRow>& table) {
  const int64_t pixels = map.height * map.width;
  std::vector<int64_t> areas(kMaxLabels, 0);
  std::mutex areas_mutex;
  torch::stable::parallel_for(0, pixels, kGrainPixels, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> local(kMaxLabels, 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t label = semantic[i];
      if (map.ids[i] == 0 && label > 0 && label < kMaxLabels) ++local[label];
    }
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
  torch::stable::parallel_for(0, pixels, kGrainPixels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t label = semantic[i];
      if (map.ids[i] == 0 && label > 0 && label < kMaxLabels) map.ids[i] = id_of_label[label];
    }
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

std::tuple<Tensor, Tensor> panoptic_merge(const Tensor& masks_in, const Tensor& boxes_in,
                                          const Tensor& scores_in, const Tensor& classes_in,
                                          const Tensor& semantic_in, double score_threshold,
                                          double overlap_threshold, int64_t stuff_area_threshold,
                                          double mask_threshold, const std::string& rule) {
  check_panoptic_merge_inputs(masks_in, boxes_in, scores_in, classes_in, semantic_in, rule);
  const Tensor masks = torch::stable::contiguous(masks_in), boxes = torch::stable::contiguous(boxes_in),
               scores = torch::stable::contiguous(scores_in), classes = torch::stable::contiguous(classes_in),
               semantic = torch::stable::contiguous(semantic_in);
  const MergeParams params{score_threshold, overlap_threshold, stuff_area_threshold, mask_threshold};

  Tensor panoptic = empty({semantic.size(0), semantic.size(1)}, ScalarType::Int, masks);
  torch::stable::zero_(panoptic);
  const Map map{panoptic.mutable_data_ptr<int32_t>(), semantic.size(0), semantic.size(1)};
  std::vector<SegmentRow> table;
  dispatch_float_or_double(masks.scalar_type(), "panoptic_merge", [&](auto tag) {
    merge_things<typename decltype(tag)::type>(map, masks, boxes, scores, classes, params, table);
  });
  fill_stuff_of_any_dtype(map, semantic, params, table);

  Tensor segments = empty({static_cast<int64_t>(table.size()), kSegmentColumns}, ScalarType::Long, masks);
  int64_t* out = segments.mutable_data_ptr<int64_t>();
  for (const SegmentRow& row : table) out = std::copy(row.begin(), row.end(), out);
  return {panoptic, segments};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panfpn_fast, CPU, m) {
  m.impl("panoptic_merge", TORCH_BOX(&panoptic_merge));
}

}  // namespace panfpn

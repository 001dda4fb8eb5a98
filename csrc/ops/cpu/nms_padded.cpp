#include <algorithm>
#include <optional>

#include "ops/cpu/suppress.h"

namespace panfpn {
namespace {

std::tuple<Tensor, Tensor> nms_padded(const Tensor& boxes_in, const Tensor& scores_in,
                                      const std::optional<Tensor>& idxs_in, double iou_threshold,
                                      int64_t max_output) {
  check_nms_padded_inputs(boxes_in, scores_in, idxs_in.has_value() ? &*idxs_in : nullptr, max_output);
  const Tensor boxes = torch::stable::contiguous(boxes_in), scores = torch::stable::contiguous(scores_in);
  const Tensor idxs = idxs_in.has_value() ? torch::stable::contiguous(*idxs_in) : scores;
  const auto [keep, kept_count] = empty_padded(boxes, max_output);
  int64_t* const kept = keep.mutable_data_ptr<int64_t>();
  int64_t* const counts = kept_count.mutable_data_ptr<int64_t>();
  const bool batched = boxes.dim() == 3;
  const int64_t images = batched ? boxes.size(0) : 1, count = boxes.size(batched ? 1 : 0);
  const auto* box_bytes = static_cast<const char*>(boxes.const_data_ptr());
  const auto* score_bytes = static_cast<const char*>(scores.const_data_ptr());
  const int64_t box_stride = count * 4 * boxes.element_size(), score_stride = count * scores.element_size();
  const int64_t* const groups = idxs_in.has_value() ? idxs.const_data_ptr<int64_t>() : nullptr;
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Candidates candidates{box_bytes + i * box_stride,
                                  boxes.scalar_type(),
                                  score_bytes + i * score_stride,
                                  scores.scalar_type(),
                                  groups != nullptr ? groups + i * count : nullptr,
                                  count};
      counts[i] = suppress(candidates, iou_threshold, max_output, kept + i * max_output);
      std::fill(kept + i * max_output + counts[i], kept + (i + 1) * max_output, int64_t{-1});
    }
  };
  // One image alone may use all threads itself.
  constexpr int64_t kBoxesWorthAThread = 1024;
  if (images == 1) {
    run(0, 1);
  } else {
    torch::stable::parallel_for(0, images, kBoxesWorthAThread / std::max<int64_t>(count, 1) + 1, run);
  }
  return {keep, kept_count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panfpn_fast, CPU, m) {
  m.impl("nms_padded", TORCH_BOX(&nms_padded));
}

}  // namespace panfpn

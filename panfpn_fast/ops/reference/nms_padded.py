"""Non-maximum suppression with outputs of static shape."""

from __future__ import annotations

import torch
from torch import Tensor

from panfpn_fast.ops.reference.nms import suppress


def nms_padded(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    """Returns the first indices that `batched_nms` keeps (`nms` if there are no groups), padded with -1.

    Args:
        boxes: [N, 4] or [B, N, 4] rows of (x1, y1, x2, y2).
        scores: [N] or [B, N].
        idxs: Integer group of each box, [N] or [B, N]; None puts all boxes into one group.
        iou_threshold: A box is dropped if its IoU with a kept box of its group is above this.
        max_output: Number of indices to return.

    Returns:
        A tuple `(keep, count)`: the indices, int64 [max_output] or [B, max_output], padded with -1, and their number,
        int64 [] or [B].
    """
    if boxes.dim() == 2:
        kept = suppress(boxes, scores, idxs, iou_threshold)[:max_output]
        keep = torch.full((max_output,), -1, dtype=torch.int64, device=boxes.device)
        keep[: len(kept)] = kept
        return keep, torch.tensor(len(kept), device=boxes.device)
    keep = torch.full((len(boxes), max_output), -1, dtype=torch.int64, device=boxes.device)
    count = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for i in range(len(boxes)):
        groups = None if idxs is None else idxs[i]
        keep[i], count[i] = nms_padded(boxes[i], scores[i], groups, iou_threshold, max_output)
    return keep, count

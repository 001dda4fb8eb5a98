"""Greedy non-maximum suppression, one kept box at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def _overlaps(boxes: Tensor, areas: Tensor, box: int, others: Tensor) -> Tensor:
    """Returns the IoU of one box with each of `others` (indices [M]) as [M] in the dtype of the boxes."""
    top_left = torch.maximum(boxes[box, :2], boxes[others, :2])
    bottom_right = torch.minimum(boxes[box, 2:], boxes[others, 2:])
    sides = (bottom_right - top_left).clamp(min=0)
    inter = sides[:, 0] * sides[:, 1]
    return inter / (areas[box] + areas[others] - inter)


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    """Returns the indices that `batched_nms` keeps (`nms` if `groups` is None), int64 [K]."""
    if boxes.dtype != torch.float64:
        boxes = boxes.float()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # torch.sort treats NaN as the greatest value, and torchvision uses the same order.
    left = torch.sort(scores, descending=True, stable=True).indices
    kept = []
    while left.numel() > 0:
        box, left = int(left[0]), left[1:]
        kept.append(box)
        # The threshold stays a double, as in torchvision's CPU kernel. NaN (0 / 0) never exceeds it.
        suppressed = _overlaps(boxes, areas, box, left).double() > iou_threshold
        if groups is not None:
            suppressed &= groups[left] == groups[box]
        left = left[~suppressed]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Drops each box whose IoU with a higher-scored kept box exceeds a threshold.

    Args:
        boxes: [N, 4] rows of (x1, y1, x2, y2).
        scores: [N].
        iou_threshold: A box is dropped if its IoU with a kept box is above this.

    Returns:
        int64 [K]: kept indices in order of descending score. NaN counts as the highest score; equal scores keep
        the order of their indices.

    Note:
        As in torchvision's CPU kernel, the IoU is float32 (float64 for float64 boxes) and the threshold a double.
        torchvision's CUDA kernel rounds the threshold to float32, which gives other results for exact ties such
        as 30/100 at 0.3.
    """
    return suppress(boxes, scores, None, iou_threshold)

"""Non-maximum suppression within groups."""

from __future__ import annotations

from torch import Tensor

from panfpn_fast.ops.reference.nms import nms, suppress


def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, exact: str = "class"
) -> Tensor:
    """Drops each box whose IoU with a higher-scored kept box of its group exceeds a threshold.

    Args:
        boxes: [N, 4] rows of (x1, y1, x2, y2).
        scores: [N].
        idxs: Integer group of each box, [N].
        iou_threshold: A box is dropped if its IoU with a kept box of its group is above this.
        exact: "class" compares the groups themselves. "torchvision" adds a multiple of the largest coordinate to
            the boxes of each group and then ignores the groups. This reproduces torchvision's rounding, and its
            collisions between groups if coordinates are negative.

    Returns:
        int64 [K]: kept indices in order of descending score. NaN counts as the highest score; equal scores keep
        the order of their indices.
    """
    if exact == "torchvision" and boxes.numel() > 0:
        boxes = boxes if boxes.dtype.itemsize >= 4 else boxes.float()
        offsets = idxs.to(boxes) * (boxes.max() + 1)
        return nms(boxes + offsets[:, None], scores, iou_threshold)
    return suppress(boxes, scores, idxs, iou_threshold)

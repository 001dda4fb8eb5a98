"""Non-maximum suppression within groups."""

from __future__ import annotations

from torch import Tensor

from panfpn_fast.ops.reference.nms import nms, suppress


def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, exact: str = "class"
) -> Tensor:
    """Keeps the boxes that overlap no better-scored kept box of their own group by more than a threshold.

    Args:
        boxes: [N, 4] rows of (x1, y1, x2, y2).
        scores: [N].
        idxs: Integer group of each box [N].
        iou_threshold: A box is dropped when its IoU with a kept box of its group is above this.
        exact: "class" compares the groups themselves. "torchvision" moves each group by a multiple of the
            largest coordinate and forgets the groups, so that rounding, and collisions where coordinates are
            negative, are torchvision's.

    Returns:
        int64 [K]: kept indices in descending score, NaN before all; of equal scores the lower index is first.
    """
    if exact == "torchvision" and boxes.numel() > 0:
        boxes = boxes if boxes.dtype.itemsize >= 4 else boxes.float()
        offsets = idxs.to(boxes) * (boxes.max() + 1)
        return nms(boxes + offsets[:, None], scores, iou_threshold)
    return suppress(boxes, scores, idxs, iou_threshold)

"""Non-maximum suppression."""

from __future__ import annotations

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, reference


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keeps the boxes that no better box overlaps by more than a threshold.

    Boxes are visited by descending score, equal scores in their given order, NaN first. A box that is still there
    is kept, and strikes out each later box whose intersection over union with it is above the threshold.

    Args:
        boxes: [N, 4] rows of (x1, y1, x2, y2); float32, float16, bfloat16 or float64.
        scores: [N], floating.
        iou_threshold: A box is struck out above this, not at it.

    Returns:
        int64 indices of the kept boxes, by descending score, on the device of `boxes`.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: An argument has the wrong shape, device or value.

    Note:
        Equals torchvision.ops.nms: boxes without area are never struck out, since 0/0 is NaN. As there, the float32
        overlap is compared with the float64 threshold on the CPU and with the threshold rounded to float32 on CUDA,
        which differ for an overlap of exactly 0.3, say. Half-precision boxes are compared in float32.
        Deterministic; on CUDA one host sync, for the length of the result.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
        >>> ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
        tensor([0, 2])
    """
    _check_inputs(boxes, scores, iou_threshold)
    boxes, scores = _checks.full_precision(boxes), _checks.full_precision(scores)
    if not _load.native(boxes.device):
        return reference.nms(boxes, scores, iou_threshold)
    return torch.ops.panfpn_fast.nms(boxes, scores, iou_threshold)


def _check_inputs(boxes: Tensor, scores: Tensor, iou_threshold: float) -> None:
    _checks.check_boxes("boxes", boxes)
    _checks.check_tensor("scores", scores, _checks.FLOATING, "[N]", (1,))
    _checks.check_rows("scores", scores, boxes.shape[0], "the boxes")
    _checks.check_device("scores", scores, boxes.device, "boxes")
    _checks.check_number("iou_threshold", iou_threshold)


@_load.register_fake("nms")
def _fake(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64)

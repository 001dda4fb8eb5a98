"""Non-maximum suppression."""

from __future__ import annotations

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, _register, reference


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Drops each box whose IoU with a higher-scored kept box exceeds a threshold.

    Boxes are visited by descending score. NaN counts as the highest score, and equal scores keep the order of their
    indices. A visited box that is not suppressed yet is kept, and suppresses each later box whose intersection over
    union (IoU) with it is above the threshold.

    Args:
        boxes: [N, 4] rows of (x1, y1, x2, y2); float32, float16, bfloat16 or float64.
        scores: [N]; float32, float16, bfloat16 or float64.
        iou_threshold: A box is suppressed if its IoU with a kept box is above this value. An equal IoU does not
            suppress it.

    Returns:
        int64 indices of the kept boxes, by descending score, on the device of `boxes`.

    Raises:
        TypeError: If `boxes` or `scores` is not a tensor of one of these dtypes, or `iou_threshold` is not a number.
        ValueError: If `boxes` or `scores` has another shape, they are on different devices, or `iou_threshold` is NaN.

    Note:
        Equals torchvision.ops.nms. Boxes without area are never suppressed at thresholds of 0 or more: their IoU is 0,
        or 0/0 = NaN with another box without area. As in torchvision, the float32 IoU is compared with the float64
        threshold on the CPU, and with the threshold rounded to float32 on CUDA. The devices can therefore differ for
        exact ties, such as an IoU of 30/100 at 0.3. Half-precision boxes are converted to float32. Deterministic. On
        CUDA there is one host sync, which reads the length of the result.

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


@_register.register_fake("nms")
def _fake(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64)

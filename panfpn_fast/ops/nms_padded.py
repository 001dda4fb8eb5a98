"""Non-maximum suppression in static shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, _register, reference


def nms_padded(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    """Returns the first indices that `batched_nms` keeps, padded with -1 to a fixed length.

    Without groups, these are the first indices that `nms` keeps. The shapes of the outputs depend only on the shapes
    of the inputs and on `max_output`. The call therefore needs no host sync on CUDA and can be part of a CUDA graph.

    Args:
        boxes: [N, 4] or [B, N, 4] rows of (x1, y1, x2, y2); float32, float16, bfloat16 or float64. The B images are
            processed independently.
        scores: [N] or [B, N]; float32, float16, bfloat16 or float64. To pad a batch to N boxes per image, add boxes
            without area with the lowest score. They are kept, but come after all other boxes.
        idxs: Group of each box, [N] or [B, N], any integer dtype; None puts all boxes into one group.
        iou_threshold: A box is suppressed if its IoU with a kept box of its group is above this value. An equal IoU
            does not suppress it.
        max_output: Maximum number of boxes to keep; at least 0.

    Returns:
        A tuple (keep, count), int64 on the device of `boxes`. keep, [max_output] or [B, max_output]: indices of the
        kept boxes by descending score, padded with -1. count, [] or [B]: the number of indices before the padding.

    Raises:
        TypeError: If `boxes`, `scores` or `idxs` is not a tensor of one of these dtypes, `iou_threshold` is not a
            number, or `max_output` is not an integer.
        ValueError: If `boxes`, `scores` or `idxs` has another shape, they are on different devices, `iou_threshold` is
            NaN, or `max_output` is negative.

    Note:
        `nms` describes ties, NaN scores, boxes without area, half precision and determinism, on the CPU and on CUDA. No
        host sync.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
        >>> ops.nms_padded(boxes, torch.tensor([0.9, 0.8, 0.7]), None, 0.5, 4)
        (tensor([ 0,  2, -1, -1]), tensor(2))
    """
    _check_inputs(boxes, scores, idxs, iou_threshold, max_output)
    boxes, scores = _checks.full_precision(boxes), _checks.full_precision(scores)
    if not _load.native(boxes.device):
        return reference.nms_padded(boxes, scores, idxs, iou_threshold, max_output)
    groups = None if idxs is None else idxs.to(torch.int64)
    keep, count = torch.ops.panfpn_fast.nms_padded(boxes, scores, groups, iou_threshold, max_output)
    return keep, count


def _check_inputs(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, max_output: int
) -> None:
    _checks.check_tensor("boxes", boxes, _checks.FLOATING, "[N, 4] or [B, N, 4]", (2, 3))
    if boxes.shape[-1] != 4:
        raise ValueError(f"boxes: expected shape [N, 4] or [B, N, 4], got {list(boxes.shape)}")
    per_box: list[tuple[str, Tensor, tuple[torch.dtype, ...]]] = [("scores", scores, _checks.FLOATING)]
    if idxs is not None:
        per_box.append(("idxs", idxs, _checks.INTEGER))
    spelled = "[N]" if boxes.dim() == 2 else "[B, N]"
    for name, value, dtypes in per_box:
        _checks.check_tensor(name, value, dtypes, spelled, (boxes.dim() - 1,))
        if value.shape != boxes.shape[:-1]:
            raise ValueError(
                f"{name}: expected shape {list(boxes.shape[:-1])}, one for each of the boxes, got {list(value.shape)}"
            )
        _checks.check_device(name, value, boxes.device, "boxes")
    _checks.check_number("iou_threshold", iou_threshold)
    _checks.check_int("max_output", max_output)
    if max_output < 0:
        raise ValueError(f"max_output: expected an integer of at least 0, got {max_output}")


@_register.register_fake("nms_padded")
def _fake(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    keep = boxes.new_empty((*boxes.shape[:-2], max_output), dtype=torch.int64)
    return keep, boxes.new_empty(boxes.shape[:-2], dtype=torch.int64)

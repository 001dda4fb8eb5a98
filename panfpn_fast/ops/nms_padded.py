"""Non-maximum suppression in static shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, reference


def nms_padded(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    """Keeps the best boxes that no better one of the same group overlaps by more than a threshold, up to a number.

    The first `max_output` of what `batched_nms` keeps (`nms`, without groups), in outputs whose shapes depend on the
    shapes of the inputs alone. So there is no host sync on CUDA, and the call can be part of a CUDA graph.

    Args:
        boxes: [N, 4] or [B, N, 4] rows of (x1, y1, x2, y2); float32, float16, bfloat16 or float64. Each of B images is
            on its own.
        scores: [N] or [B, N], floating. Padding rows of a batch need boxes without area at the lowest score: they are
            kept, after all others.
        idxs: Group of each box [N] or [B, N], any integers; None for one group.
        iou_threshold: A box is struck out above this, not at it.
        max_output: How many boxes to keep at most.

    Returns:
        A tuple of keep and count, int64 on the device of `boxes`. keep, [max_output] or [B, max_output]: indices of
        the kept boxes by descending score, filled up with -1. count, [] or [B]: how many they are.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: An argument has the wrong shape, device or value.

    Note:
        Ties, NaN, empty boxes, half precision and determinism as in `nms`, on CPU and CUDA. No host sync.

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


@_load.register_fake("nms_padded")
def _fake(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    keep = boxes.new_empty((*boxes.shape[:-2], max_output), dtype=torch.int64)
    return keep, boxes.new_empty(boxes.shape[:-2], dtype=torch.int64)

"""Non-maximum suppression within groups."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, reference
from panfpn_fast.ops.nms import _check_inputs, nms


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    exact: Literal["class", "torchvision"] = "class",
) -> Tensor:
    """Keeps the boxes that no better box of the same group overlaps by more than a threshold.

    Args:
        boxes: [N, 4] rows of (x1, y1, x2, y2); float32, float16, bfloat16 or float64.
        scores: [N], floating.
        idxs: Group of each box [N], any integers: its class, its level, or both in one number.
        iou_threshold: A box is struck out above this, not at it.
        exact: "class" compares the groups themselves. "torchvision" reproduces the arithmetic of shifting each
            group by a multiple of the largest coordinate, as torchvision does for few boxes: the shift rounds
            coordinates, and negative coordinates let groups touch, so that some boxes differ. Half-precision boxes
            are shifted in float32, where in their own type the shift would overflow.

    Returns:
        int64 indices of the kept boxes, by descending score, on the device of `boxes`.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: An argument has the wrong shape, device or value.

    Note:
        Ties, empty boxes, half precision and determinism as in `nms`. On CUDA one host sync, for the length of the
        result.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [2.0, 0.0, 12.0, 10.0]])
        >>> ops.batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]), 0.5)
        tensor([0, 1])
    """
    _check_inputs(boxes, scores, iou_threshold)
    _checks.check_tensor("idxs", idxs, _checks.INTEGER, "[N]", (1,))
    _checks.check_rows("idxs", idxs, boxes.shape[0], "the boxes")
    _checks.check_device("idxs", idxs, boxes.device, "boxes")
    if exact not in ("class", "torchvision"):
        raise ValueError(f'exact: expected "class" or "torchvision", got {exact!r}')
    boxes, scores = _checks.full_precision(boxes), _checks.full_precision(scores)
    if exact == "torchvision":
        shift = boxes.max() + 1 if boxes.shape[0] > 0 else boxes.new_ones(())
        return nms(boxes + (idxs.to(boxes) * shift)[:, None], scores, iou_threshold)
    if not _load.native(boxes.device):
        return reference.batched_nms(boxes, scores, idxs, iou_threshold)
    return torch.ops.panfpn_fast.batched_nms(boxes, scores, idxs.to(torch.int64), iou_threshold)


@_load.register_fake("batched_nms")
def _fake(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64)

"""Non-maximum suppression within groups."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, _register, reference
from panfpn_fast.ops.nms import _check_inputs, nms


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    exact: Literal["class", "torchvision"] = "class",
) -> Tensor:
    """Drops each box whose IoU with a higher-scored kept box of the same group exceeds a threshold.

    Args:
        boxes: [N, 4] rows of (x1, y1, x2, y2); float32, float16, bfloat16 or float64.
        scores: [N]; float32, float16, bfloat16 or float64.
        idxs: Group of each box, [N], any integer dtype: its class, its level, or both combined in one number.
        iou_threshold: A box is suppressed if its IoU with a kept box of its group is above this value. An equal IoU
            does not suppress it.
        exact: "class" compares the groups themselves. "torchvision" reproduces the arithmetic that torchvision uses
            for few boxes: it shifts the boxes of each group by a multiple of the largest coordinate and then ignores
            the groups. The shift rounds coordinates, and with negative coordinates boxes of different groups can
            overlap, so the results differ for some boxes. Half-precision boxes are shifted in float32, because the
            shift would overflow in their own dtype.

    Returns:
        int64 indices of the kept boxes, by descending score, on the device of `boxes`.

    Raises:
        TypeError: If `boxes`, `scores` or `idxs` is not a tensor of one of these dtypes, or `iou_threshold` is not a
            number.
        ValueError: If `boxes`, `scores` or `idxs` has another shape, they are on different devices, `iou_threshold` is
            NaN, or `exact` is another string.

    Note:
        `nms` describes ties, NaN scores, boxes without area, half precision and determinism. On CUDA there is one host
        sync, which reads the length of the result.

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


@_register.register_fake("batched_nms")
def _fake(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64)

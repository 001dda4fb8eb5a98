"""What is patched in torchvision, at the functions through which all its detection models go.

torchvision decides itself how it shifts classes apart for NMS and to which level a box belongs: ours take part below
these decisions, so that they are those of the version at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from panfpn_fast import ops
from panfpn_fast.integrations.patching import Framework, Replacement, servable
from panfpn_fast.ops._checks import full_precision

# Whether a box is kept hangs on the last bit, and torchvision computes overlaps of half-precision boxes in half.
_EXACT = (torch.float32, torch.float64)
# float16 is accumulated in float32 by ours: what differs is torchvision's rounding. It refuses bfloat16.
_POOLED = (*_EXACT, torch.float16)
# What our ops raise for arguments that they do not take; torchvision takes more, or has an error of its own.
_REFUSED = (TypeError, ValueError)
# How far two float32 evaluations of a level, torchvision's epsilon of 1e-6 among it, may lie apart: about 3e-6.
_LEVEL_MARGIN = 1e-5

_Function = Callable[..., Any]


def _one_precision(dtypes: Sequence[torch.dtype], *tensors: Tensor) -> bool:
    """Whether all tensors have the same of these dtypes, once autocast, which makes halves float32, has seen them."""
    found = set()
    for tensor in tensors:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        upcast = half and torch.is_autocast_enabled(tensor.device.type)
        found.add(torch.float32 if upcast else tensor.dtype)
    return len(found) == 1 and found <= set(dtypes)


def _rows_agree(*tensors: Tensor) -> bool:
    """Whether all have as many rows; not so where torch.compile could not tell, and would stop at our op's check."""
    if any(tensor.dim() == 0 for tensor in tensors):
        return False
    return all(guard_or_false(tensor.shape[0] == tensors[0].shape[0]) for tensor in tensors[1:])


def _suits_nms(boxes: Tensor, scores: Tensor, *idxs: Tensor) -> bool:
    return (
        servable(boxes, scores, *idxs)
        and _one_precision(_EXACT, boxes, scores)
        and _rows_agree(boxes, scores, *idxs)
    )


def _nms(original: _Function) -> _Function:
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        if _suits_nms(boxes, scores):
            try:
                return ops.nms(boxes, scores, iou_threshold)
            except _REFUSED:
                pass
        return original(boxes, scores, iou_threshold)

    return nms


def _nms_of_shifted_boxes(original: _Function) -> _Function:
    """For few boxes: one NMS over boxes whose classes were shifted apart."""

    def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        # Half-precision boxes are shifted in half by torchvision, even where autocast is on.
        if _suits_nms(boxes, scores, idxs) and boxes.dtype in _EXACT:
            try:
                return ops.batched_nms(boxes, scores, idxs, iou_threshold, exact="torchvision")
            except _REFUSED:
                pass
        return original(boxes, scores, idxs, iou_threshold)

    return batched_nms


def _nms_of_each_class(original: _Function) -> _Function:
    """For many boxes: one NMS after the other."""

    def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        if _suits_nms(boxes, scores, idxs):
            try:
                kept = ops.batched_nms(boxes, scores, idxs, iou_threshold).sort().values
            except _REFUSED:
                pass
            else:
                # The same sort of the same values as torchvision's, which leaves equal scores in no defined order.
                return kept[scores[kept].sort(descending=True).indices]
        return original(boxes, scores, idxs, iou_threshold)

    return batched_nms


def _roi_align(original: _Function) -> _Function:
    def roi_align(
        input: Tensor,
        boxes: Tensor | list[Tensor],
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = False,
    ) -> Tensor:
        parts = boxes if isinstance(boxes, (list, tuple)) else (boxes,)
        if servable(input, *parts) and _one_precision(_POOLED, input, *parts):
            try:
                pooled = ops.roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)
            except _REFUSED:
                pass
            else:
                return pooled.contiguous()  # as torchvision's is, for channels-last input too
        return original(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)

    return roi_align


def _multiscale_roi_align(original: _Function) -> _Function:
    def multiscale_roi_align(
        x_filtered: list[Tensor],
        boxes: list[Tensor],
        output_size: tuple[int, int],
        sampling_ratio: int,
        scales: list[float] | None,
        mapper: Any,
    ) -> Tensor:
        if (
            scales is not None
            and len(scales) == len(x_filtered) > 1
            and servable(*x_filtered, *boxes)
            and _one_precision(_POOLED, *x_filtered, *boxes)
            and not torch.compiler.is_compiling()  # which the question whether levels agree would interrupt
            and _same_levels(boxes, scales, mapper)
        ):
            try:
                pooled = ops.multiscale_roi_align(
                    x_filtered,
                    boxes,
                    output_size,
                    scales,
                    sampling_ratio,
                    aligned=False,
                    canonical_box_size=mapper.s0,
                    canonical_level=mapper.lvl0,
                    level_epsilon=0.0,
                )
            except _REFUSED:
                pass
            else:
                return pooled.contiguous()
        return original(x_filtered, boxes, output_size, sampling_ratio, scales, mapper)

    return multiscale_roi_align


def _same_levels(boxes: Sequence[Tensor], scales: Sequence[float], mapper: Any) -> bool:
    """Whether our op would choose the level that torchvision's mapper does, for every box and without doubt.

    torchvision adds its epsilon after the logarithm, ours before it: within about 1e-6 of a threshold they differ, and
    for boxes of negative area, which torchvision leaves out. One host sync.
    """
    if not boxes or any(of_image.dim() != 2 or of_image.shape[1] != 4 for of_image in boxes):
        return False
    if not hasattr(mapper, "s0") or not hasattr(mapper, "lvl0"):
        return False
    x1, y1, x2, y2 = full_precision(torch.cat(list(boxes))).unbind(1)
    level = mapper.lvl0 + torch.log2(torch.sqrt((x2 - x1) * (y2 - y1)) / mapper.s0) + math.log2(scales[0])
    lowest, highest = (
        (level + shift).floor().clamp(0, len(scales) - 1) for shift in (-_LEVEL_MARGIN, _LEVEL_MARGIN)
    )
    levels = mapper(boxes)
    return bool(((lowest == levels) & (levels == highest)).all())


FRAMEWORK = Framework(
    package="torchvision",
    distribution="torchvision",
    tested=("0.26", "0.29"),
    replacements=(
        Replacement("torchvision.ops.boxes:nms", "nms", _nms),
        Replacement(
            "torchvision.ops.boxes:_batched_nms_coordinate_trick", "batched_nms", _nms_of_shifted_boxes
        ),
        Replacement("torchvision.ops.boxes:_batched_nms_vanilla", "batched_nms", _nms_of_each_class),
        Replacement("torchvision.ops.roi_align:roi_align", "roi_align", _roi_align),
        Replacement(
            "torchvision.ops.poolers:_multiscale_roi_align", "multiscale_roi_align", _multiscale_roi_align
        ),
    ),
)

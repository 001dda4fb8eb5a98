"""Replacements for torchvision's functions that all its detection models call.

torchvision keeps two decisions: whether NMS shifts the boxes of each class apart, and which level a box belongs to.
The replacements are below these decisions, so both follow the installed version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from panfpn_fast import ops
from panfpn_fast.integrations._calls import served
from panfpn_fast.integrations.patching import Framework, Replacement, servable
from panfpn_fast.ops._checks import full_precision

# NMS: the last bit can decide whether a box is kept, and torchvision computes overlaps of half-precision boxes in half
# precision.
_EXACT = (torch.float32, torch.float64)
# RoIAlign: `ops.roi_align` accumulates float16 in float32, so only torchvision's rounding differs. torchvision rejects
# bfloat16.
_POOLED = (*_EXACT, torch.float16)
# Two float32 evaluations of a level, including torchvision's epsilon of 1e-6, differ by up to about 3e-6.
_LEVEL_MARGIN = 1e-5


def _one_precision(dtypes: Sequence[torch.dtype], *tensors: Tensor) -> bool:
    """Whether all tensors have the same dtype and it is in `dtypes`; autocast counts half precision as float32."""
    found = set()
    for tensor in tensors:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        upcast = half and torch.is_autocast_enabled(tensor.device.type)
        found.add(torch.float32 if upcast else tensor.dtype)
    return len(found) == 1 and found <= set(dtypes)


def _rows_agree(*tensors: Tensor) -> bool:
    """Whether all tensors have the same number of rows.

    False if torch.compile does not know the numbers, because it could not compile the check inside our op.
    """
    if any(tensor.dim() == 0 for tensor in tensors):
        return False
    return all(guard_or_false(tensor.shape[0] == tensors[0].shape[0]) for tensor in tensors[1:])


def _suits_nms(boxes: Tensor, scores: Tensor, *idxs: Tensor) -> bool:
    return (
        servable(boxes, scores, *idxs)
        and _one_precision(_EXACT, boxes, scores)
        and _rows_agree(boxes, scores, *idxs)
    )


@served
def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor | None:
    if not _suits_nms(boxes, scores):
        return None
    return ops.nms(boxes, scores, iou_threshold)


@served
def _nms_of_shifted_boxes(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor | None:
    """Serves calls with few boxes, for which torchvision shifts the classes apart and runs one NMS."""
    # torchvision shifts half-precision boxes in half precision, even under autocast.
    if not _suits_nms(boxes, scores, idxs) or boxes.dtype not in _EXACT:
        return None
    return ops.batched_nms(boxes, scores, idxs, iou_threshold, exact="torchvision")


@served
def _nms_of_each_class(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor | None:
    """Serves calls with many boxes, for which torchvision runs one NMS per class."""
    if not _suits_nms(boxes, scores, idxs):
        return None
    kept = ops.batched_nms(boxes, scores, idxs, iou_threshold).sort().values
    # torchvision sorts the same values with the same unstable sort, so equal scores end up in the same order.
    return kept[scores[kept].sort(descending=True).indices]


@served
def _roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor | None:
    parts = boxes if isinstance(boxes, (list, tuple)) else (boxes,)
    if not servable(input, *parts) or not _one_precision(_POOLED, input, *parts):
        return None
    pooled = ops.roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)
    return pooled.contiguous()  # torchvision's result is contiguous for channels-last input too


@served
def _multiscale_roi_align(
    x_filtered: list[Tensor],
    boxes: list[Tensor],
    output_size: tuple[int, int],
    sampling_ratio: int,
    scales: list[float] | None,
    mapper: Any,
) -> Tensor | None:
    if scales is None or not len(scales) == len(x_filtered) > 1:
        return None
    if not servable(*x_filtered, *boxes) or not _one_precision(_POOLED, *x_filtered, *boxes):
        return None
    # _same_levels reads a result on the host, which would break the graph of torch.compile.
    if torch.compiler.is_compiling() or not _same_levels(boxes, scales, mapper):
        return None
    return ops.multiscale_roi_align(
        x_filtered,
        boxes,
        output_size,
        scales,
        sampling_ratio,
        aligned=False,
        canonical_box_size=mapper.s0,
        canonical_level=mapper.lvl0,
        level_epsilon=0.0,
    ).contiguous()


def _same_levels(boxes: Sequence[Tensor], scales: Sequence[float], mapper: Any) -> bool:
    """Whether our op certainly chooses the same level as torchvision's mapper for every box.

    torchvision adds its epsilon after the logarithm, our op before it. The levels therefore differ within about 1e-6 of
    a threshold. They also differ for boxes of negative area, which torchvision does not pool. One host sync.
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

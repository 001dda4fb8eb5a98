"""Panoptic merging without a host sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, _register, reference
from panfpn_fast.ops.panoptic_merge import Rule, check_arguments, segments_of
from panfpn_fast.ops.reference import PanopticSegments


def panoptic_merge_padded(
    masks: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    semantic: Tensor,
    image_size: Sequence[int],
    *,
    max_segments: int,
    score_threshold: float = 0.5,
    overlap_threshold: float = 0.5,
    stuff_area_threshold: int = 4096,
    mask_threshold: float = 0.5,
    rule: Rule = "detectron2",
) -> tuple[Tensor, PanopticSegments, Tensor]:
    """Merges like `panoptic_merge`, with a segment table of fixed size.

    Args:
        masks: [N, M_h, M_w] or [N, 1, M_h, M_w], values in 0..1; float32, float16, bfloat16, bool, or float64 on the
            CPU.
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image; float32, float16, bfloat16 or float64.
        scores: [N]; float32, float16, bfloat16 or float64. To pad the instances, give the padding a score below
            `score_threshold`.
        classes: Thing class of each instance, [N], any integer dtype.
        semantic: Label map [height, width]; uint8, int16, int32 or int64. Labels 1..4095 are stuff, all others void.
        image_size: (height, width) of the image.
        max_segments: Number of rows of the segment table; at least 0. N plus the number of stuff classes always
            suffices.
        score_threshold: Instances with a lower score are dropped.
        overlap_threshold: An instance is dropped if more than this share of its mask is already taken.
        stuff_area_threshold: A stuff class is dropped if fewer pixels than this remain for it.
        mask_threshold: A pixel belongs to an instance if its value in the pasted mask is at least this.
        rule: "detectron2", "mmdetection" or "panopticapi"; see `panoptic_merge`.

    Returns:
        A tuple of the panoptic map, int32 [height, width]; its `PanopticSegments` with `max_segments` rows; and the
        number of segments, int64 []. Unused rows have id 0, label -1, instance -1 and zeros elsewhere. If the number
        exceeds `max_segments`, the map contains all segments, but the table only the first `max_segments`.

    Raises:
        TypeError: If a tensor argument is not a tensor of one of these dtypes, or another argument is not of the type
            in the signature.
        ValueError: If a tensor has another shape, the tensors are on different devices, a threshold is NaN,
            `max_segments` is negative, or `rule` is another string.

    Note:
        `panoptic_merge` describes the rules, their sources and the corner cases. Deterministic. No host sync, so the
        call can be captured in a CUDA graph.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> panoptic, segments, count = ops.panoptic_merge_padded(
        ...     torch.ones(1, 28, 28), torch.tensor([[0.0, 0.0, 64.0, 64.0]]), torch.tensor([0.9]),
        ...     torch.tensor([17]), torch.full((128, 128), 3), (128, 128), max_segments=4)
        >>> segments.label, count
        (tensor([17,  3, -1, -1]), tensor(2))
    """
    masks, boxes, scores, classes, height, width = check_arguments(
        masks,
        boxes,
        scores,
        classes,
        semantic,
        image_size,
        score_threshold,
        overlap_threshold,
        stuff_area_threshold,
        mask_threshold,
        rule,
    )
    _checks.check_int("max_segments", max_segments)
    if max_segments < 0:
        raise ValueError(f"max_segments: expected an integer of at least 0, got {max_segments}")
    if not _load.native(masks.device):
        return reference.panoptic_merge_padded(
            masks,
            boxes,
            scores,
            classes,
            semantic,
            (height, width),
            max_segments=max_segments,
            score_threshold=score_threshold,
            overlap_threshold=overlap_threshold,
            stuff_area_threshold=stuff_area_threshold,
            mask_threshold=mask_threshold,
            rule=rule,
        )
    panoptic, table, count = torch.ops.panfpn_fast.panoptic_merge_padded(
        masks,
        boxes,
        scores,
        classes,
        semantic,
        score_threshold,
        overlap_threshold,
        stuff_area_threshold,
        mask_threshold,
        rule,
        max_segments,
    )
    return panoptic, segments_of(table, scores), count


@_register.register_fake("panoptic_merge_padded")
def _fake(
    masks: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    semantic: Tensor,
    score_threshold: float,
    overlap_threshold: float,
    stuff_area_threshold: int,
    mask_threshold: float,
    rule: str,
    max_segments: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        masks.new_empty(tuple(semantic.shape), dtype=torch.int32),
        masks.new_empty((max_segments, 5), dtype=torch.int64),
        masks.new_empty((), dtype=torch.int64),
    )

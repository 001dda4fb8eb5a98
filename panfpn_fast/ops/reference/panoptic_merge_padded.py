"""Panoptic merging with a segment table of fixed size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from panfpn_fast.ops._segments import PanopticSegments
from panfpn_fast.ops.reference.panoptic_merge import panoptic_merge


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
    rule: str = "detectron2",
) -> tuple[Tensor, PanopticSegments, Tensor]:
    """Runs `panoptic_merge` and pads or truncates the segments to `max_segments` rows.

    Returns:
        A tuple of the map, the segments and the number of segments before truncation, int64 [].
    """
    panoptic, segments = panoptic_merge(
        masks,
        boxes,
        scores,
        classes,
        semantic,
        image_size,
        score_threshold=score_threshold,
        overlap_threshold=overlap_threshold,
        stuff_area_threshold=stuff_area_threshold,
        mask_threshold=mask_threshold,
        rule=rule,
    )
    count = len(segments.id)
    of_nothing = PanopticSegments(*map(torch.tensor, (0, False, -1, 0.0, 0, -1)))
    padded = [
        torch.cat([column[:max_segments], fill.to(column).expand(max(max_segments - count, 0))])
        for column, fill in zip(segments, of_nothing, strict=True)
    ]
    return panoptic, PanopticSegments(*padded), torch.tensor(count, device=panoptic.device)

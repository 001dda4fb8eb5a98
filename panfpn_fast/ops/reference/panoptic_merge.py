"""Merging of instances and stuff into one panoptic map, with the rules of three peers.

detectron2 (panoptic_fpn.py), mmdetection (heuristic_fusion_head.py) and panopticapi
(combine_semantic_and_instance_predictions.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from panfpn_fast.ops.reference.paste_masks import paste_values

# Stuff labels are below this.
_LABELS = 4096


class PanopticSegments(NamedTuple):
    """Segments of a panoptic map, things first; S rows.

    Attributes:
        id: int32 [S], the value of the segment in the map, 1..S.
        isthing: bool [S].
        label: int64 [S], from `classes` for things and from `semantic` for stuff.
        score: float32 [S], zero for stuff.
        area: int64 [S], pixels of the segment in the map.
        instance: int64 [S], the row in `masks`; -1 for stuff.
    """

    id: Tensor
    isthing: Tensor
    label: Tensor
    score: Tensor
    area: Tensor
    instance: Tensor


def _overlaps_too_much(claimed: int, area: int, overlap_threshold: float, rule: str) -> bool:
    """Compares the share of an instance that others hold, in the peer's arithmetic."""
    if rule == "mmdetection":
        # int64 + float and int64 / float32 are float32 in torch, and a Python float is compared as float32.
        share = torch.tensor(claimed) / (torch.tensor(area) + 1e-5)
        return bool(share > overlap_threshold)
    return claimed / area > overlap_threshold


def panoptic_merge(
    masks: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    semantic: Tensor,
    image_size: Sequence[int],
    *,
    score_threshold: float = 0.5,
    overlap_threshold: float = 0.5,
    stuff_area_threshold: int = 4096,
    mask_threshold: float = 0.5,
    rule: str = "detectron2",
) -> tuple[Tensor, PanopticSegments]:
    """Gives every pixel to one instance or one kind of stuff.

    Args:
        masks: Instance masks [N, M_h, M_w] or [N, 1, M_h, M_w], values in [0, 1].
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image.
        scores: [N].
        classes: Integer thing class of each instance [N].
        semantic: Integer label map [height, width]; 1..4095 are stuff, the rest void.
        image_size: (height, width).
        score_threshold: Instances below this are dropped; with "detectron2" and "mmdetection" the first of them ends
            the instances, so that NaN, which comes last, is dropped with it.
        overlap_threshold: An instance is dropped when more than this share of its mask is taken.
        stuff_area_threshold: Stuff with fewer pixels left is dropped.
        mask_threshold: A pixel belongs to an instance where the pasted mask is at least this.
        rule: "detectron2", "mmdetection" or "panopticapi".

    Returns:
        The panoptic map, int32 [height, width] with 0 = void, and its segments, none of them without pixels.
    """
    dtype = torch.float64 if masks.dtype == torch.float64 else torch.float32
    masks = masks.reshape(masks.shape[0], *masks.shape[-2:]).to(dtype)
    boxes, scores = boxes.to(dtype), scores.float()
    panoptic = torch.zeros(*image_size, dtype=torch.int32, device=semantic.device)
    # Of each segment: isthing, label, score, area, instance.
    found: list[tuple[bool, int, float, int, int]] = []

    # Ascending order of the negated scores puts NaN last.
    for instance in torch.sort(-scores, stable=True).indices.tolist():
        score = float(scores[instance])
        if score < score_threshold:
            if rule == "panopticapi":
                continue
            break
        mask = paste_values(masks[instance], boxes[instance], image_size) >= mask_threshold
        area = int(mask.sum())
        if area == 0:
            continue
        free = mask & (panoptic == 0)
        free_area = int(free.sum())
        if free_area == 0 or _overlaps_too_much(area - free_area, area, overlap_threshold, rule):
            continue
        found.append((True, int(classes[instance]), score, free_area, instance))
        panoptic[free] = len(found)

    for label in torch.unique(semantic).tolist():
        if not 0 < label < _LABELS:
            continue
        free = (semantic == label) & (panoptic == 0)
        area = int(free.sum())
        if area == 0 or area < stuff_area_threshold:
            continue
        found.append((False, label, 0.0, area, -1))
        panoptic[free] = len(found)

    def column(field: int, column_dtype: torch.dtype) -> Tensor:
        return torch.tensor([row[field] for row in found], dtype=column_dtype, device=panoptic.device)

    segments = PanopticSegments(
        id=torch.arange(1, len(found) + 1, dtype=torch.int32, device=panoptic.device),
        isthing=column(0, torch.bool),
        label=column(1, torch.int64),
        score=column(2, torch.float32),
        area=column(3, torch.int64),
        instance=column(4, torch.int64),
    )
    return panoptic, segments

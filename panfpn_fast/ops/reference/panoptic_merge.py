"""Merges instances and stuff into one panoptic map by the rules of three peers.

The peers are detectron2 (panoptic_fpn.py), mmdetection (heuristic_fusion_head.py) and panopticapi
(combine_semantic_and_instance_predictions.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from panfpn_fast.ops._segments import PanopticSegments
from panfpn_fast.ops.reference.paste_masks import paste_values

# Stuff labels are below this.
_LABELS = 4096


def _overlaps_too_much(claimed: int, area: int, overlap_threshold: float, rule: str) -> bool:
    """Whether the share of an instance that is already taken exceeds the threshold, in the peer's arithmetic."""
    if rule == "mmdetection":
        # In PyTorch, int64 + float and int64 / float32 give float32, and a Python float is compared as float32.
        taken, size = torch.tensor([claimed, area], dtype=torch.float32, device="cpu")
        share = taken / (size + 1e-5)
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
    """Assigns every pixel to one instance, to one stuff class or to void.

    Args:
        masks: Instance masks [N, M_h, M_w] or [N, 1, M_h, M_w], values in [0, 1].
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image.
        scores: [N].
        classes: Integer thing class of each instance, [N].
        semantic: Integer label map [height, width]; values 1..4095 are stuff, all others void.
        image_size: (height, width).
        score_threshold: Instances below this are dropped. With "detectron2" and "mmdetection" the first such instance
            also drops all later ones, among them those with a score of NaN, which come last.
        overlap_threshold: An instance is dropped if more than this share of its mask is already taken.
        stuff_area_threshold: A stuff class with fewer free pixels is dropped.
        mask_threshold: A pixel belongs to an instance if its value in the pasted mask is at least this.
        rule: "detectron2", "mmdetection" or "panopticapi".

    Returns:
        A tuple of the panoptic map, int32 [height, width] with 0 for void, and its segments, each with at least one
        pixel.
    """
    dtype = torch.float64 if masks.dtype == torch.float64 else torch.float32
    masks = masks.reshape(masks.shape[0], *masks.shape[-2:]).to(dtype)
    boxes, scores = boxes.to(dtype), scores.float()
    panoptic = torch.zeros(*image_size, dtype=torch.int32, device=semantic.device)
    # For each segment: isthing, label, score, area, instance.
    found: list[tuple[bool, int, float, int, int]] = []

    # Sorting the negated scores in ascending order puts NaN last.
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

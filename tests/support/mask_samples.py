"""Inputs for the ops that paste masks, chosen so that no pixel depends on rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panfpn_fast.ops.reference.paste_masks import paste_values
from support.op_checks import FLIP_MARGIN, Sample
from support.op_samples import DEGENERATE_BOXES, generator, random_boxes, random_masks


def is_decided(masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float) -> bool:
    """Whether all pixel values differ from the threshold by more than rounding errors."""
    for mask, box in zip(masks.float(), boxes.float(), strict=True):
        value = paste_values(mask, box, image_size)
        # Outside the pasted mask, the value is zero on every device.
        if bool((((value - threshold).abs() <= FLIP_MARGIN) & (value != 0)).any()):
            return False
    return True


def random_semantic(image_size: tuple[int, int], seed: int) -> Tensor:
    """Returns a label map of 8 x 8 pixel blocks with labels 0..6."""
    height, width = image_size
    blocks = torch.randint(0, 7, (-(-height // 8), -(-width // 8)), generator=generator(seed))
    return blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width].contiguous()


def merge_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    """Returns samples for panoptic_merge."""

    def sample(
        count: int,
        image_size: tuple[int, int],
        mask_size: tuple[int, int] = (28, 28),
        labels: torch.dtype = torch.uint8,
        boxes: Tensor | None = None,
        **kwargs: Any,
    ) -> Sample:
        """Uses the first seed for which no pixel depends on rounding, so that all devices must give the same result."""
        for seed in range(100):
            masks = random_masks(count, *mask_size, seed=seed).to(dtype)
            placed = (random_boxes(count, image_size, seed) if boxes is None else boxes).to(dtype)
            if is_decided(masks, placed, image_size, kwargs.get("mask_threshold", 0.5)):
                break
        else:
            raise AssertionError("no seed without undecided pixels")
        scores = (torch.randint(2, 20, (count,), generator=generator(seed)) / 20).to(dtype)
        classes = torch.randint(0, 80, (count,), generator=generator(seed))
        semantic = random_semantic(image_size, seed).to(labels)
        arguments = (masks, placed, scores, classes, semantic, image_size)
        return Sample(arguments, kwargs).map_tensors(lambda tensor: tensor.to(device))

    stuff: dict[str, Any] = {"stuff_area_threshold": 100}
    lenient: dict[str, Any] = {"overlap_threshold": 2.0, "stuff_area_threshold": 0}
    strict: dict[str, Any] = {"overlap_threshold": 0.2, "score_threshold": 0.2, "mask_threshold": 0.4}
    return [
        sample(12, (67, 93), **stuff),
        sample(5, (41, 30), (14, 17), **stuff),
        sample(0, (67, 93), **stuff),
        sample(12, (0, 93), **stuff),
        sample(12, (67, 93), labels=torch.int64, **strict),
        sample(12, (43, 61), rule="mmdetection", **strict),
        sample(12, (43, 61), rule="panopticapi", **strict),
        sample(9, (33, 35), labels=torch.int64, **lenient),
        sample(12, (21, 23), (14, 14), boxes=DEGENERATE_BOXES, **stuff),
    ]

"""Annotations of an image for the benchmarks of training steps."""

from __future__ import annotations

import torch

from panfpn_fast.data.sample import Target

from ..harness import inputs

_OBJECTS = 12


def annotation(size: tuple[int, int]) -> Target:
    """Returns a dozen objects with rectangular masks, on stuff, for an image of a size."""
    boxes = inputs.boxes(_OBJECTS, size).round()
    boxes = torch.cat((boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2] + 8)), dim=1)
    instances = torch.zeros(size, dtype=torch.int16)
    for number, (x1, y1, x2, y2) in enumerate(boxes.int().tolist(), 1):
        instances[y1:y2, x1:x2] = number
    semantic = inputs.semantic_labels(size).to(torch.int16)
    semantic[instances > 0] = 0
    return Target(boxes, inputs.groups(_OBJECTS), instances, semantic)

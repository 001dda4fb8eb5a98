"""What pooling boxes from feature maps costs at least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .harness import Cost, nbytes
from .peers import assign_levels


def touched_pixels(boxes: Tensor, height: int, width: int) -> int:
    """How many pixels of a map lie in at least one of some boxes [K, 4], given in pixels of the map."""
    touched = torch.zeros(height, width, dtype=torch.bool)
    low, high = boxes.floor().clamp(min=0).long().tolist(), boxes.ceil().clamp(min=0).long().tolist()
    for (x0, y0, _, _), (_, _, x1, y1) in zip(low, high, strict=True):
        touched[y0:y1, x0:x1] = True
    return int(touched.sum())


def pooling_cost(
    features: Sequence[Tensor], boxes: Tensor, scales: Sequence[float], output: Tensor, sampling_ratio: int
) -> Cost:
    """Reads the pixels that some box touches on its level, writes the output, and lerps each sample in each channel.

    Args:
        features: Maps [1, C, H, W].
        boxes: [K, 4] in pixels of the image.
        scales: Of each map; a single map takes all boxes.
        output: [K, C, height, width].
        sampling_ratio: As for the op; at most 0 for as many samples as a cell spans pixels.

    Returns:
        The cost, with eight operations for a sample: four products and four sums.
    """
    boxes = boxes.detach().cpu().float()
    levels = assign_levels(boxes, scales) if len(features) > 1 else torch.zeros(len(boxes), dtype=torch.int64)
    channels, *cells = output.shape[1:]
    pixels = samples = 0
    for level, (level_features, scale) in enumerate(zip(features, scales, strict=True)):
        of_level = boxes[levels == level] * scale
        pixels += touched_pixels(of_level, *level_features.shape[2:])
        sides = (of_level[:, 2:] - of_level[:, :2]) / torch.tensor([cells[1], cells[0]])
        grid = torch.ceil(sides) if sampling_ratio <= 0 else torch.full_like(sides, sampling_ratio)
        samples += int((grid[:, 0] * grid[:, 1]).sum()) * cells[0] * cells[1]
    read = pixels * channels * features[0].element_size()
    return Cost(bytes=read + nbytes(boxes) + nbytes(output), flops=8 * samples * channels)


def training_cost(
    features: Sequence[Tensor], boxes: Tensor, scales: Sequence[float], side: int, sampling_ratio: int
) -> Cost:
    """Pooling to side x side cells and back: samples are visited twice, and gradients are as large as the maps."""
    pooled = features[0].new_empty(len(boxes), features[0].shape[1], side, side)
    forward = pooling_cost(features, boxes, scales, pooled, sampling_ratio)
    return Cost(bytes=forward.bytes + nbytes(pooled) + nbytes(features), flops=2 * forward.flops)

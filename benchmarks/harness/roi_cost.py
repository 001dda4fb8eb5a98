"""The least cost of pooling boxes from feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .comparison import Cost, nbytes
from .peers import assign_levels


def touched_pixels(boxes: Tensor, height: int, width: int) -> int:
    """Returns how many pixels of a map at least one box covers; boxes [K, 4] are in pixels of the map."""
    touched = torch.zeros(height, width, dtype=torch.bool)
    low, high = boxes.floor().clamp(min=0).long().tolist(), boxes.ceil().clamp(min=0).long().tolist()
    for (x0, y0, _, _), (_, _, x1, y1) in zip(low, high, strict=True):
        touched[y0:y1, x0:x1] = True
    return int(touched.sum())


def pooling_cost(
    features: Sequence[Tensor], boxes: Tensor, scales: Sequence[float], output: Tensor, sampling_ratio: int
) -> Cost:
    """Returns the cost of reading each pixel that a box touches, interpolating each sample and writing the output.

    Args:
        features: Maps [1, C, H, W].
        boxes: Boxes [K, 4] in pixels of the image.
        scales: Scale of each map; a single map takes all boxes.
        output: The pooled features [K, C, height, width].
        sampling_ratio: As in the op; with 0 or less, a bin has as many samples as it spans pixels.

    Returns:
        The cost, with eight operations per sample and channel: four products and four sums.
    """
    boxes = boxes.detach().cpu().float()
    levels = assign_levels(boxes, scales) if len(features) > 1 else torch.zeros(len(boxes), dtype=torch.int64)
    channels, *bins = output.shape[1:]
    pixels = samples = 0
    for level, (level_features, scale) in enumerate(zip(features, scales, strict=True)):
        of_level = boxes[levels == level] * scale
        pixels += touched_pixels(of_level, *level_features.shape[2:])
        sides = (of_level[:, 2:] - of_level[:, :2]) / torch.tensor([bins[1], bins[0]])
        grid = torch.ceil(sides) if sampling_ratio <= 0 else torch.full_like(sides, sampling_ratio)
        samples += int((grid[:, 0] * grid[:, 1]).sum()) * bins[0] * bins[1]
    read = pixels * channels * features[0].element_size()
    return Cost(bytes=read + nbytes(boxes) + nbytes(output), flops=8 * samples * channels)


def training_cost(
    features: Sequence[Tensor], boxes: Tensor, scales: Sequence[float], side: int, sampling_ratio: int
) -> Cost:
    """Returns the cost of pooling to side x side bins and back.

    Forward and backward each visit all samples; the gradients are as large as the maps.
    """
    pooled = features[0].new_empty(len(boxes), features[0].shape[1], side, side)
    forward = pooling_cost(features, boxes, scales, pooled, sampling_ratio)
    return Cost(bytes=forward.bytes + nbytes(pooled) + nbytes(features), flops=2 * forward.flops)

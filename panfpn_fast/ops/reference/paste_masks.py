"""Pastes small masks into the image with the arithmetic of detectron2 (mask_ops.py, all pixels)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Axis(NamedTuple):
    """Positions of the P pixels of one image axis on a mask axis that is padded with one zero on each side."""

    low: Tensor  # int64 [P]
    high: Tensor  # int64 [P]
    low_weight: Tensor  # float [P]
    high_weight: Tensor  # float [P]
    finite: Tensor  # bool [P]


def _locate(start: Tensor, end: Tensor, pixels: int, size: int) -> _Axis:
    """Maps pixel centres to mask coordinates in the expression order of detectron2 and grid_sample."""
    centre = torch.arange(pixels, device=start.device, dtype=start.dtype) + 0.5
    normalised = (centre - start) / (end - start) * 2 - 1
    position = ((normalised + 1) * size - 1) / 2
    finite = torch.isfinite(position)
    position = torch.where(finite, position, -1.0)
    low = torch.floor(position)
    high = low + 1
    return _Axis(
        low.clamp(-1, size).to(torch.int64) + 1,
        high.clamp(-1, size).to(torch.int64) + 1,
        high - position,
        position - low,
        finite,
    )


def paste_values(mask: Tensor, box: Tensor, image_size: Sequence[int]) -> Tensor:
    """Samples one mask bilinearly at every pixel of the image.

    Args:
        mask: Mask [M_h, M_w], float32 or float64.
        box: Box (x1, y1, x2, y2) of the mask in the image, [4], in the dtype of `mask`.
        image_size: (height, width).

    Returns:
        Values [height, width]. They are zero outside the box, and everywhere if the box is empty or not finite.
    """
    height, width = image_size
    extent = box[2:] - box[:2]
    if not bool(torch.isfinite(box).all() and torch.isfinite(extent).all()):
        return mask.new_zeros(height, width)
    y = _locate(box[1], box[3], height, mask.shape[0])
    x = _locate(box[0], box[2], width, mask.shape[1])
    bordered = F.pad(mask, (1, 1, 1, 1))
    value = bordered[y.low[:, None], x.low] * (x.low_weight * y.low_weight[:, None])
    value += bordered[y.low[:, None], x.high] * (x.high_weight * y.low_weight[:, None])
    value += bordered[y.high[:, None], x.low] * (x.low_weight * y.high_weight[:, None])
    value += bordered[y.high[:, None], x.high] * (x.high_weight * y.high_weight[:, None])
    return torch.where(y.finite[:, None] & x.finite, value, 0.0)


def paste_masks(masks: Tensor, boxes: Tensor, image_size: Sequence[int], threshold: float = 0.5) -> Tensor:
    """Resamples each mask into its box of the image and thresholds it.

    Args:
        masks: [N, M_h, M_w] or [N, 1, M_h, M_w], values in [0, 1].
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image; pixel i is the interval [i, i + 1).
        image_size: (height, width).
        threshold: A pixel is set if its value is at least this. A negative threshold returns the values.

    Returns:
        bool [N, height, width]; for a negative threshold uint8, the values scaled to 0..255 and truncated.
    """
    dtype = torch.float64 if masks.dtype == torch.float64 else torch.float32
    masks = masks.reshape(masks.shape[0], *masks.shape[-2:]).to(dtype)
    boxes = boxes.to(dtype)
    out_dtype = torch.uint8 if threshold < 0 else torch.bool
    pasted = torch.empty(len(masks), *image_size, dtype=out_dtype, device=masks.device)
    for n in range(len(masks)):
        value = paste_values(masks[n], boxes[n], image_size)
        pasted[n] = (value * 255).clamp(0, 255).to(torch.uint8) if threshold < 0 else value >= threshold
    return pasted

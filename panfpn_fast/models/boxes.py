"""Arithmetic on boxes (x1, y1, x2, y2) in pixels of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_SIZE = math.log(1000.0 / 16)
"""Upper limit of dw and dh (Detectron's constant); above it, exp() makes boxes too large."""

Size = tuple[int, int] | Tensor
"""Height and width: two integers, or an integer tensor [..., 2] that broadcasts against boxes [..., 4]."""


def decode_boxes(
    deltas: Tensor, boxes: Tensor, weights: Sequence[float], clamp_shrinking: bool = False
) -> Tensor:
    """Moves and scales boxes by the deltas that a head predicted (R-CNN's parametrisation).

    A delta of (0.1, 0, 0, log 2) with weights of 1 moves a 10 x 10 box right by 1 and doubles its width.

    Args:
        deltas: Deltas [..., 4] (dx, dy, dw, dh), float32 or float64.
        boxes: Boxes [..., 4], broadcast against `deltas`.
        weights: Divisors of the four deltas.
        clamp_shrinking: Whether dw and dh also have the lower limit `-MAX_LOG_SIZE`.

    Returns:
        Boxes in the shape and dtype of `deltas`.

    Note:
        detectron2's Box2BoxTransform limits dw and dh only from above, mmdetection's DeltaXYWHBBoxCoder from above
        and below.
    """
    x1, y1, x2, y2 = boxes.to(deltas.dtype).unbind(dim=-1)
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas.unbind(dim=-1), weights, strict=True))
    width, height = x2 - x1, y2 - y1
    least = -MAX_LOG_SIZE if clamp_shrinking else None
    centre_x = dx * width + (x1 + 0.5 * width)
    centre_y = dy * height + (y1 + 0.5 * height)
    half_width = 0.5 * (dw.clamp(least, MAX_LOG_SIZE).exp() * width)
    half_height = 0.5 * (dh.clamp(least, MAX_LOG_SIZE).exp() * height)
    return torch.stack(
        (centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height), dim=-1
    )


def encode_boxes(targets: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Computes the deltas with which `decode_boxes` transforms `boxes` to `targets`.

    Args:
        targets: Target boxes [..., 4].
        boxes: Boxes [..., 4]. The deltas of a box without area are not finite.
        weights: Factors of the four deltas.

    Returns:
        Deltas [..., 4] (dx, dy, dw, dh).
    """
    size, target_size = boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]
    centre, target_centre = boxes[..., :2] + 0.5 * size, targets[..., :2] + 0.5 * target_size
    moves = torch.cat(((target_centre - centre) / size, (target_size / size).log()), dim=-1)
    # A tensor of weights would be copied to the GPU, and the host would wait for the copy.
    return torch.stack(
        [move * weight for move, weight in zip(moves.unbind(-1), weights, strict=True)], dim=-1
    )


def clip_boxes(boxes: Tensor, size: Size) -> Tensor:
    """Clips boxes [..., 4] to an image of `size` (height, width); NaN stays NaN."""
    x, y = boxes[..., 0::2], boxes[..., 1::2]
    if isinstance(size, Tensor):
        x, y = x.clamp(min=0).minimum(size[..., 1:]), y.clamp(min=0).minimum(size[..., :1])
    else:
        x, y = x.clamp(min=0, max=size[1]), y.clamp(min=0, max=size[0])
    return torch.stack((x, y), dim=-1).flatten(-2)


def nonempty(boxes: Tensor) -> Tensor:
    """Returns whether boxes [..., 4] have a width and a height above 0, as bool [...]."""
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def scale_boxes(boxes: Tensor, old: Size, new: Size) -> Tensor:
    """Scales boxes [..., 4] from an image of size `old` (height, width) to its copy resized to `new`.

    Both sizes are pairs, or both are tensors.
    """
    scale_y: Tensor | float
    scale_x: Tensor | float
    if isinstance(old, Tensor):
        assert isinstance(new, Tensor)
        # Divided in float64 and rounded once, like the quotient of two Python integers in the product below.
        scale = (new.double() / old.double()).to(boxes.dtype)
        scale_y, scale_x = scale[..., :1], scale[..., 1:]
    else:
        assert not isinstance(new, Tensor)
        scale_y, scale_x = new[0] / old[0], new[1] / old[1]
    return torch.stack((boxes[..., 0::2] * scale_x, boxes[..., 1::2] * scale_y), dim=-1).flatten(-2)

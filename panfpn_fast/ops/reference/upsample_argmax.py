"""Upsampling, crop, second resampling, arg max: with the logits of every pixel of the output."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resampled_logits(
    logits: Tensor, scale_factor: int, crop: Sequence[int] | None, size: Sequence[int] | None
) -> Tensor:
    """The logits that the arg max chooses from, [N, C, height, width], in float32 (float64 for float64)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if wide.numel() == 0:
        height, width = size or crop or (side * scale_factor for side in logits.shape[2:])
        return wide.new_empty(*logits.shape[:2], height, width)

    def resample(values: Tensor) -> Tensor:
        values = F.interpolate(values, scale_factor=scale_factor, mode="bilinear", align_corners=False)
        if crop is not None:
            values = values[..., : crop[0], : crop[1]]
        if size is not None:
            values = F.interpolate(values, size=tuple(size), mode="bilinear", align_corners=False)
        return values

    resampled = resample(torch.where(wide.isfinite(), wide, 0.0))
    # F.interpolate would make NaN of infinities that it reads with a weight of zero.
    for value, where in (
        (math.inf, wide == math.inf),
        (-math.inf, wide == -math.inf),
        (math.nan, wide.isnan()),
    ):
        resampled = torch.where(resample(where.to(wide.dtype)) > 0, resampled + value, resampled)
    return resampled


def upsample_argmax(
    logits: Tensor,
    scale_factor: int = 4,
    *,
    crop: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    return_prob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Chooses the class of the largest logit after one or two bilinear resamplings.

    Args:
        logits: [N, C, H, W].
        scale_factor: Of the first resampling.
        crop: (height, width) of the part that is kept of its result.
        size: (height, width) of the result of the second resampling; None for none.
        return_prob: Also return the softmax probability of the class.

    Returns:
        Labels [N, height, width], uint8, or int16 above 256 classes; with `return_prob` also float32 probabilities
        of the same shape.

    Note:
        torch.argmax's rules: the first of equal classes, NaN before any number. Half precision is upcast first.
    """
    resampled = resampled_logits(logits.detach(), scale_factor, crop, size)
    label = resampled.argmax(1)
    labels = label.to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)
    if not return_prob:
        return labels
    return labels, resampled.softmax(1).gather(1, label[:, None])[:, 0].float()

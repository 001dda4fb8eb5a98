"""Upsamples, crops and resamples logits, then takes the arg max; the logits of all output pixels are in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resampled_logits(
    logits: Tensor, scale_factor: int, crop: Sequence[int] | None, size: Sequence[int] | None
) -> Tensor:
    """Returns the logits whose arg max is taken, [N, C, height, width], in float32 (float64 for float64)."""
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
    # F.interpolate would turn infinities that have a weight of zero into NaN.
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
    """Returns the class of the largest logit after one or two bilinear resamplings.

    Args:
        logits: [N, C, H, W].
        scale_factor: Scale factor of the first resampling.
        crop: (height, width) to which the result of the first resampling is cropped; None keeps all of it.
        size: (height, width) of the output of the second resampling; None skips the second resampling.
        return_prob: Whether to also return the softmax probability of the class.

    Returns:
        Labels [N, height, width], uint8, or int16 for more than 256 classes. With `return_prob`, a tuple of the labels
        and their probabilities, float32 of the same shape.

    Note:
        Ties follow torch.argmax: the first of equal classes wins, and NaN wins over any number. Half precision is
        converted to float32 first.
    """
    resampled = resampled_logits(logits.detach(), scale_factor, crop, size)
    label = resampled.argmax(1)
    labels = label.to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)
    if not return_prob:
        return labels
    return labels, resampled.softmax(1).gather(1, label[:, None])[:, 0].float()

"""Cross-entropy of bilinearly upsampled logits; all upsampled logits are in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    scale_factor: int,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Upsamples the logits and applies F.cross_entropy, in float32 or float64.

    Differentiable in `logits`.

    Args:
        logits: [N, C, H, W].
        target: Class of each pixel, [N, H * scale_factor, W * scale_factor], any integer dtype.
        scale_factor: Scale factor of the bilinear upsampling (align_corners=False).
        ignore_index: Pixels with this value in `target` do not count.
        weight: Weight of each class, [C], or None.
        label_smoothing: Weight of the uniform distribution in the target distribution, from 0 to 1.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss: a scalar, or [N, H * scale_factor, W * scale_factor] for "none"; float32, or float64 for float64
        logits.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    size = (logits.shape[2] * scale_factor, logits.shape[3] * scale_factor)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(dtype)
        if logits.numel() == 0:  # F.interpolate rejects empty input
            upsampled = logits.new_zeros(*logits.shape[:2], *size) + logits.sum()
        else:
            upsampled = F.interpolate(logits, scale_factor=scale_factor, mode="bilinear", align_corners=False)
        return F.cross_entropy(
            upsampled,
            target.long(),
            weight if weight is None else weight.to(dtype),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )

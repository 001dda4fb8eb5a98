"""Cross-entropy of bilinearly upsampled logits, which are made in full."""

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
    """Interpolates, then takes F.cross_entropy, in float32 or float64.

    Differentiable in `logits`.

    Args:
        logits: [N, C, H, W].
        target: [N, H * scale_factor, W * scale_factor] classes of any integer dtype.
        scale_factor: Of the bilinear upsampling with align_corners=False.
        ignore_index: Value in `target` of pixels that do not count.
        weight: Of each class, [C].
        label_smoothing: Share of the uniform distribution in that of the targets.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, a scalar or [N, H * scale_factor, W * scale_factor]; float32, or float64 for float64 logits.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    size = (logits.shape[2] * scale_factor, logits.shape[3] * scale_factor)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(dtype)
        if logits.numel() == 0:  # which F.interpolate refuses
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

"""GroupNorm (Wu and He, ECCV 2018) written from its definition, with ReLU and PyTorch's bilinear upsampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast._layout import channels_last_only


def group_norm_relu_upsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    scale_factor: int = 2,
    residual: Tensor | None = None,
) -> Tensor:
    """Applies GroupNorm and ReLU, upsamples bilinearly and adds a residual.

    Differentiable in `x`, `weight`, `bias` and `residual`.

    Args:
        x: Feature map [N, C, H, W].
        weight: Scale of the normalised channels, [C].
        bias: Offset of the normalised channels, [C].
        num_groups: Number of channel groups; divides C.
        eps: Added to the variance.
        scale_factor: Output pixels per input pixel along each axis.
        residual: Added to the result, [N, C, scale_factor * H, scale_factor * W]; or None.

    Returns:
        [N, C, scale_factor * H, scale_factor * W] in the dtype of `x`.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, channels, height, width = x.shape
    groups = x.to(dtype).reshape(batch, num_groups, channels // num_groups * height * width)
    deviation = groups - groups.mean(2, keepdim=True)
    variance = deviation.square().mean(2, keepdim=True)
    normalised = (deviation / torch.sqrt(variance + eps)).reshape(x.shape)
    output = F.relu(normalised * weight.to(dtype)[:, None, None] + bias.to(dtype)[:, None, None])
    if output.numel() == 0:  # F.interpolate rejects empty input
        output = output.reshape(batch, channels, height * scale_factor, width * scale_factor)
    elif scale_factor > 1:
        output = F.interpolate(output, scale_factor=float(scale_factor), mode="bilinear", align_corners=False)
    if residual is not None:
        output = output + residual.to(dtype)
    output = output.to(x.dtype)
    return output.contiguous(memory_format=torch.channels_last) if channels_last_only(x) else output

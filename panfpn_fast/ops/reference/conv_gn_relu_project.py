"""One stage of the semantic head followed by its predictor (Kirillov et al., CVPR 2019, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops.reference.group_norm_relu_upsample import group_norm_relu_upsample


def conv_gn_relu_project(
    x: Tensor,
    conv_weight: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """Applies a 3x3 convolution, GroupNorm, ReLU and a 1x1 convolution, then adds a residual.

    Differentiable in `x`, the parameters and `residual`.

    Args:
        x: Feature map [N, C_in, H, W].
        conv_weight: Weight of the 3x3 convolution (padding 1, stride 1, no bias), [C_out, C_in, 3, 3].
        gn_weight: Scale of the normalised channels, [C_out].
        gn_bias: Offset of the normalised channels, [C_out].
        num_groups: Number of channel groups; divides C_out.
        weight: Weight of the 1x1 convolution, [K, C_out].
        bias: Bias of the 1x1 convolution, [K], or None.
        eps: Added to the variance in GroupNorm.
        residual: Added to the result: [N, K, H, W], or [N, K, H / 2, W / 2], which is first upsampled bilinearly; or
            None.
        prepared: Ignored.

    Returns:
        [N, K, H, W] in the dtype of the 3x3 convolution's result, channels-last.
    """
    y = F.conv2d(x, conv_weight, padding=1)
    # Keep the activations in float32 or float64: they are not rounded to half precision.
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    activations = group_norm_relu_upsample(y.to(dtype), gn_weight, gn_bias, num_groups, eps, 1)
    logits = torch.einsum("kc,nchw->nkhw", weight.to(dtype), activations)
    if bias is not None:
        logits = logits + bias.to(dtype)[:, None, None]
    if residual is not None:
        residual = residual.to(dtype)
        if residual.shape != logits.shape:
            residual = F.interpolate(residual, scale_factor=2.0, mode="bilinear", align_corners=False)
        logits = logits + residual
    return logits.to(y.dtype).contiguous(memory_format=torch.channels_last)

"""One stage of the semantic head (Kirillov et al., CVPR 2019, section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops.reference.group_norm_relu_upsample import group_norm_relu_upsample


def conv_gn_relu_upsample(
    x: Tensor,
    conv_weight: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    scale_factor: int = 2,
    prepared: Tensor | None = None,
) -> Tensor:
    """Applies a 3x3 convolution, GroupNorm and ReLU, then upsamples bilinearly.

    Differentiable in `x` and the three parameter tensors.

    Args:
        x: Feature map [N, C_in, H, W].
        conv_weight: Weight of the 3x3 convolution (padding 1, stride 1, no bias), [C_out, C_in, 3, 3].
        gn_weight: Scale of the normalised channels, [C_out].
        gn_bias: Offset of the normalised channels, [C_out].
        num_groups: Number of channel groups; divides C_out.
        eps: Added to the variance in GroupNorm.
        scale_factor: Output pixels per input pixel along each axis.
        prepared: Ignored.

    Returns:
        [N, C_out, scale_factor * H, scale_factor * W] in the dtype of the convolution's result.
    """
    y = F.conv2d(x, conv_weight, padding=1)
    return group_norm_relu_upsample(y, gn_weight, gn_bias, num_groups, eps, scale_factor)

"""A stage of the semantic head (Kirillov et al., CVPR 2019, section 3)."""

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
) -> Tensor:
    """Convolves 3x3, normalises groups of channels, applies ReLU and upsamples bilinearly.

    Differentiable in `x` and the three parameters.

    Args:
        x: Feature map [N, C_in, H, W].
        conv_weight: [C_out, C_in, 3, 3]; padding 1, stride 1, no bias.
        gn_weight: [C_out], multiplies the normalised channels.
        gn_bias: [C_out], is added to them.
        num_groups: Divides C_out.
        eps: Added to the variance.
        scale_factor: Output pixels per input pixel along either axis.

    Returns:
        [N, C_out, scale_factor * H, scale_factor * W] in the dtype of the convolution's result.
    """
    y = F.conv2d(x, conv_weight, padding=1)
    return group_norm_relu_upsample(y, gn_weight, gn_bias, num_groups, eps, scale_factor)

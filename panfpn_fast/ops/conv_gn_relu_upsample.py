"""A stage of the semantic head: convolution, GroupNorm, ReLU and bilinear upsampling."""

from __future__ import annotations

from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, reference
from panfpn_fast.ops._conv_statistics import check_conv, conv3x3_statistics
from panfpn_fast.ops.group_norm_relu_upsample import check_groups, check_parameters


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

    The convolution has padding 1, stride 1 and no bias. The upsampling is that of align_corners=False: centres of
    pixels coincide, so that with `scale_factor=2` output column 1 lies at 0.25 between input columns 0 and 1.

    Args:
        x: Feature map [N, C_in, H, W]; float32, float16, bfloat16, or float64 on the CPU. Channels-last is fastest.
        conv_weight: [C_out, C_in, 3, 3] in the dtype of `x`; under autocast in any dtype.
        gn_weight: [C_out], multiplies the normalised channels; in float32 or the dtype of `x`.
        gn_bias: [C_out], is added to them; in the dtype of `gn_weight`.
        num_groups: Divides C_out.
        eps: Added to the variance; above 0.
        scale_factor: Output pixels per input pixel along either axis, at least 1.

    Returns:
        [N, C_out, scale_factor * H, scale_factor * W] on the device of `x` and in its dtype, under autocast in
        autocast's; channels-last where F.conv2d's result is, and on CUDA always.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: An argument has the wrong shape, device or value.

    Note:
        Equals `group_norm_relu_upsample(F.conv2d(x, conv_weight, padding=1), gn_weight, gn_bias, num_groups, eps,
        scale_factor)`. On CUDA the convolution yields the statistics as it goes. No host sync.

        Differentiable once, in `x` and the three parameters. Deterministic but for what F.conv2d does on the CPU.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> x, conv_weight = torch.randn(1, 8, 5, 7), torch.randn(16, 8, 3, 3)
        >>> ops.conv_gn_relu_upsample(x, conv_weight, torch.ones(16), torch.zeros(16), num_groups=4).shape
        torch.Size([1, 16, 10, 14])
    """
    check_conv(x, conv_weight)
    channels = conv_weight.shape[0]
    check_parameters("gn_weight", gn_weight, "gn_bias", gn_bias, x, channels)
    check_groups(num_groups, channels, eps)
    _checks.check_scale_factor(scale_factor)
    ops = _load.semantic_ops(x.device)
    if ops is None:
        return reference.conv_gn_relu_upsample(
            x, conv_weight, gn_weight, gn_bias, num_groups, eps, scale_factor
        )
    y, mean, rstd = conv3x3_statistics(x, conv_weight, num_groups, eps)
    output: Tensor = ops.group_norm_relu_upsample(y, mean, rstd, gn_weight, gn_bias, scale_factor, None)
    return output

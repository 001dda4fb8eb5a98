"""The convolution that comes before a GroupNorm, with that GroupNorm's statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks
from panfpn_fast.ops._conv3x3 import conv3x3


def check_conv(x: Any, conv_weight: Any) -> None:
    """Checks the map and the weights of a 3x3 convolution."""
    _checks.check_feature_map("x", x)
    # Under autocast both are cast to its dtype; without it they must agree. The meta device knows no autocast.
    cast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtypes = tuple(dtype for dtype in _checks.FLOATING if dtype != torch.float64) if cast else (x.dtype,)
    _checks.check_tensor("conv_weight", conv_weight, dtypes, "[C_out, C_in, 3, 3]", (4,))
    if conv_weight.shape[1] != x.shape[1] or conv_weight.shape[2:] != (3, 3):
        raise ValueError(
            f"conv_weight: expected shape [C_out, {x.shape[1]}, 3, 3] for x's {x.shape[1]} channels, got "
            f"{list(conv_weight.shape)}"
        )
    _checks.check_device("conv_weight", conv_weight, x.device, "x")


def conv3x3_statistics(
    x: Tensor, conv_weight: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolves and finds the statistics of the result's groups; for devices that have native ops.

    Args:
        x: [N, C_in, H, W].
        conv_weight: [C_out, C_in, 3, 3]; padding 1, stride 1, no bias.
        num_groups: Divides C_out.
        eps: Added to the variance.

    Returns:
        The convolution's result y [N, C_out, H, W], in autocast's dtype where that is on, and the mean and the
        reciprocal standard deviation of its groups, [N, num_groups] in float32 (float64 for float64). Only y is
        differentiable: what normalises it answers for its gradient through the statistics.
    """
    ops = _load.semantic_ops(x.device)
    if x.device.type == "cuda":
        if torch.is_autocast_enabled("cuda"):  # as it does with torch's own convolutions
            dtype = torch.get_autocast_dtype("cuda")
            x, conv_weight = x.to(dtype), conv_weight.to(dtype)
        y, mean, rstd = ops.conv3x3_statistics(x, conv_weight, num_groups, eps)
        return y, mean, rstd
    y = conv3x3(x, conv_weight)
    mean, rstd = ops.group_norm_statistics(y.detach(), num_groups, eps)
    return y, mean, rstd

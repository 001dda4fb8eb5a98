"""The convolution before a GroupNorm, together with the statistics of the GroupNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panfpn_fast.ops import _register
from panfpn_fast.ops._winograd import takes_winograd
from panfpn_fast.ops.conv3x3 import autocasts, conv3x3, conv3x3_gradients, takes_prepared


def conv3x3_statistics(
    x: Tensor, conv_weight: Tensor, num_groups: int, eps: float, prepared: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolves and computes the statistics of the result's groups, on devices that have an implementation.

    Args:
        x: [N, C_in, H, W].
        conv_weight: [C_out, C_in, 3, 3]; padding 1, stride 1, no bias.
        num_groups: Divisor of C_out.
        eps: Added to the variance.
        prepared: The transformed weights, or None.

    Returns:
        The result y of the convolution [N, C_out, H, W], under autocast in autocast's dtype, and mean and reciprocal
        standard deviation of its groups, float32 [N, num_groups] (float64 for float64). Only y is differentiable: the
        op that normalizes y computes the part of its gradient that goes through the statistics.
    """
    if takes_prepared(x, conv_weight, prepared):
        y = torch.ops.panfpn_fast.conv3x3_prepared(x, prepared, conv_weight.shape[0], None, False, None)
        return y, *torch.ops.panfpn_fast.group_norm_statistics(y, num_groups, eps)
    if autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, conv_weight = x.to(dtype), conv_weight.to(dtype)
    y, mean, rstd = torch.ops.panfpn_fast.conv3x3_statistics(x, conv_weight, num_groups, eps)
    return y, mean, rstd


def _on_cpu(input: Tensor, weight: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = conv3x3(input, weight)
    return y, *torch.ops.panfpn_fast.group_norm_statistics(y, num_groups, eps)


@_register.register_fake("conv3x3_statistics")
def _fake(input: Tensor, weight: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if input.device.type == "cuda":
        size = (input.shape[0], weight.shape[0], *input.shape[2:])
        y = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    else:
        y = conv3x3(input, weight)  # in the layout that torch gives its result
    return y, *torch.ops.panfpn_fast.group_norm_statistics(y, num_groups, eps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    winograd = takes_winograd(input, weight)
    return *conv3x3_gradients(grad, input, weight, ctx.needs_input_grad[:2], winograd), None, None


_register.register_autograd("conv3x3_statistics", _backward, _setup_context)
_register.implement_in_triton("conv3x3_statistics", on_cpu=_on_cpu)

"""The 3x3 convolution of the semantic head on the CPU: Winograd's where it pays, else torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks

# Below this many pixels the transformation of the weights takes what the multiplications save.
_LEAST_PIXELS = 1024

# Its matrix products are written for registers of 64 bytes; with narrower ones oneDNN is faster.
_WIDE_REGISTERS = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """F.conv2d(x, weight, padding=1), by fewer multiplications where that is faster.

    Args:
        x: [N, C_in, H, W] on the CPU.
        weight: [C_out, C_in, 3, 3].

    Returns:
        [N, C_out, H, W]; channels-last where `x` is.

    Note:
        Winograd's F(2x2, 3x3) takes AVX-512, float32, channels-last, and channels in multiples of 16. Its sums are
        shorter than those of the definition, so that it comes closer to the exact result. Deterministic, whatever the
        number of threads.
    """
    if _takes_winograd(x, weight):
        output: Tensor = torch.ops.panfpn_fast.conv3x3(x, weight)
        return output
    return F.conv2d(x, weight, padding=1)


def _takes_winograd(x: Tensor, weight: Tensor) -> bool:
    return (
        _WIDE_REGISTERS
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _checks.channels_last_only(x)
        and weight.shape[0] % 16 == 0
        and weight.shape[1] % 16 == 0
        and x.shape[0] * x.shape[2] * x.shape[3] >= _LEAST_PIXELS
    )


@_load.register_fake("conv3x3")
def _fake(input: Tensor, weight: Tensor) -> Tensor:
    batch, _, height, width = input.shape
    size = (batch, weight.shape[0], height, width)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    input, weight = ctx.saved_tensors
    input_grad = weight_grad = None
    if ctx.needs_input_grad[0]:
        # The transposed convolution is one with the weights turned around.
        input_grad = torch.ops.panfpn_fast.conv3x3(grad, weight.flip(2, 3).transpose(0, 1))
    if ctx.needs_input_grad[1]:
        ones = [1, 1]
        _, weight_grad, _ = torch.ops.aten.convolution_backward(
            grad, input, weight, None, ones, ones, ones, False, [0, 0], 1, [False, True, False]
        )
    return input_grad, weight_grad


_load.register_autograd("conv3x3", _backward, _setup_context)

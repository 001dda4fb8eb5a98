"""What all host functions need: registering a Triton op, and launching a kernel eagerly, traced or interpreted.

A host function is given to `triton_op`, so torch.compile traces through it: it decides by sizes, dtypes and layouts
only, never by values, and launches with `wrap_triton(kernel)[grid](...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

NAMESPACE = "panfpn_fast_triton"


def triton_op(function: Callable[..., Any]) -> Any:
    """Registers a host function, under its own name and with the schema that its annotations say, as a Triton op."""
    return torch.library.triton_op(f"{NAMESPACE}::{function.__name__}", function, mutates_args=())


def block_double_backward(op: Any, name: str) -> None:
    """Makes backward through an op's backward op an error, where torch by itself would warn and give none."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"panfpn_fast.ops.{name} has no second derivative; detach its gradient")

    op.register_autograd(backward)


# The name is torch's own: torch.library.triton_op looks in a host function's source for calls of it, so that its
# compile caches know which kernels the op launches.
def wrap_triton(kernel: Any) -> Any:
    """torch.library.wrap_triton, which in torch 2.11 does not take interpreted kernels, for these too."""
    if not isinstance(kernel, triton.JITFunction):
        return kernel
    return torch.library.wrap_triton(kernel)


def channels_last(x: Tensor) -> Tensor:
    """The feature map in the kernels' layout: itself where it has it already."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Fresh memory for a channels-last feature map."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def next_power_of_2(value: int) -> int:
    """Least power of two that is not below a size; a traced size becomes a constant of the graph."""
    return 1 << max(int(value) - 1, 0).bit_length()

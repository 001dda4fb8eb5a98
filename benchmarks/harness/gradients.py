"""Forward and backward pass together, as in a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .comparison import tensors


def forward_backward(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Wraps a function to return the gradients of half its squared sum with respect to its first argument.

    The first argument is a tensor or a sequence of tensors.
    """

    def call(features: Tensor | Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
        leaves = [feature.detach().requires_grad_() for feature in tensors(features)]
        output = function(leaves[0] if isinstance(features, Tensor) else leaves, *rest)
        return torch.autograd.grad(output, leaves, output.detach())

    return call


def close_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Requires gradients to be equal up to the rounding of sums over many boxes, whose order differs."""
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.shape == other.shape, f"shape {list(mine.shape)} and {list(other.shape)}"
        worst, largest = float((mine - other).abs().max()), float(other.abs().max())
        assert worst <= 1e-4 * largest, (
            f"gradients {i} differ by up to {worst:.2g}; the largest is {largest:.2g}"
        )

"""Forward and backward together, as a training step runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def forward_backward(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Calls a function and returns the gradient of half the sum of its squares for its first argument."""

    def call(features: Tensor, *rest: Any) -> Tensor:
        leaf = features.detach().requires_grad_()
        output = function(leaf, *rest)
        return torch.autograd.grad(output, leaf, output.detach())[0]

    return call


def close_gradients(ours: Tensor, theirs: Tensor) -> None:
    """Demands equal gradients up to the rounding of sums over many boxes, which come in different orders."""
    assert ours.shape == theirs.shape, f"shape {list(ours.shape)} and {list(theirs.shape)}"
    worst, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert worst <= 1e-4 * largest, (
        f"gradients differ by up to {worst:.2g} where the largest is {largest:.2g}"
    )

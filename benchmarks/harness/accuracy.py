"""Declares how an op's rounding error is measured; `benchmarks.scripts.numerics` measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .comparison import no_problem

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class AccuracyCase:
    """An op and the same computation in plain PyTorch.

    Attributes:
        name: Its name in the table.
        arguments: Makes float64 arguments on the CPU.
        ours: Our op.
        pytorch: The same in eager PyTorch. Its float64 result is the exact result.
        is_choice: Whether results are choices. The error is then the share of results that differ.
        problem: Returns why `pytorch` cannot run on a device, or None if it can.
    """

    name: str
    arguments: Callable[[], tuple[Any, ...]]
    ours: Function
    pytorch: Function
    is_choice: bool = False
    problem: Callable[[torch.device], str | None] = no_problem


def random_normal(*shape: int, seed: int = 0) -> Tensor:
    """Draws normally distributed float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _gradient(function: Function) -> Function:
    """Wraps a function to return the gradient for its first argument."""

    def call(leaf: Tensor, *rest: Any) -> Tensor:
        leaf = leaf.detach().requires_grad_()
        output = function(leaf, *rest)
        return torch.autograd.grad(output, leaf, random_normal(*output.shape, seed=8).to(output))[0]

    return call


def forward_and_gradient(
    name: str,
    arguments: Callable[[], tuple[Any, ...]],
    ours: Function,
    pytorch: Function,
    problem: Callable[[torch.device], str | None] = no_problem,
) -> list[AccuracyCase]:
    """Declares a case for the result of an op and one for the gradient of its first argument."""
    return [
        AccuracyCase(name, arguments, ours, pytorch, problem=problem),
        AccuracyCase(f"{name}, gradient", arguments, _gradient(ours), _gradient(pytorch), problem=problem),
    ]

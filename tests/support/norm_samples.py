"""Helpers for the tests of the normalising kernels."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-5


def meta_map(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns a meta tensor that stands for a channels-last feature map on a GPU."""
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def meta_norm(x: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Returns meta tensors that stand for mean, rstd, weight and bias."""
    statistics = torch.empty((x.shape[0], groups), device="meta")
    parameters = torch.empty(x.shape[1], device="meta")
    return statistics, statistics, parameters, parameters


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    """Returns normally distributed float32 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(
    actual: Tensor, expected: Tensor, steps: float = 1.0, rounded_to: torch.dtype | None = None
) -> None:
    """Compares with a float64 result, relative to its largest value.

    The float32 tolerance allows for sums of some hundred terms. The half-precision tolerance allows for `steps`
    roundings of one step each (not of half a step, because Triton's interpreter truncates to bfloat16).

    Args:
        actual: The result to check.
        expected: The expected result in float64.
        steps: Number of times that values are rounded to half precision.
        rounded_to: The dtype of these roundings, if the dtype of the result is wider.
    """
    dtype = rounded_to or actual.dtype
    step = 2e-6 if dtype == torch.float32 else steps * torch.finfo(dtype).eps
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), atol=step * scale, rtol=0)

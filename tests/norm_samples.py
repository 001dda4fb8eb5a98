"""What the tests of the kernels that normalise share."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-5


def meta_map(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Stands for a channels-last map on a GPU."""
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def meta_norm(x: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Stands for mean, rstd, weight and bias."""
    statistics = torch.empty((x.shape[0], groups), device="meta")
    parameters = torch.empty(x.shape[1], device="meta")
    return statistics, statistics, parameters, parameters


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal float32 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(
    actual: Tensor, expected: Tensor, steps: float = 1.0, rounded_to: torch.dtype | None = None
) -> None:
    """Compares with a float64 result, relative to its largest value.

    In float32: sums of some hundred terms. In half precision: as many roundings of one step (not of half a one,
    because Triton's interpreter cuts off what does not fit into bfloat16).

    Args:
        actual: Found.
        expected: In float64.
        steps: Roundings to half precision on the way.
        rounded_to: The dtype of these roundings, where the result's own is wider.
    """
    dtype = rounded_to or actual.dtype
    step = 2e-6 if dtype == torch.float32 else steps * torch.finfo(dtype).eps
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), atol=step * scale, rtol=0)

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.compile_kernels import CAPABILITIES, Launch
from support.kernel_checks import check_compiled, check_traced

pytest.importorskip("triton", reason="Triton is not installed")

from panfpn_fast.ops.triton.group_norm_statistics import group_norm_statistics

EPS = 1e-5


def _map(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


LAUNCHES = {
    "128 channels": Launch(group_norm_statistics, (_map((2, 128, 200, 336), torch.bfloat16), 32, EPS)),
    "256 channels, float32": Launch(group_norm_statistics, (_map((1, 256, 50, 84), torch.float32), 32, EPS)),
    "64 channels, float16": Launch(group_norm_statistics, (_map((1, 64, 100, 168), torch.float16), 32, EPS)),
    "odd": Launch(group_norm_statistics, (_map((1, 42, 13, 17), torch.float32), 6, EPS)),
    "one group": Launch(group_norm_statistics, (_map((1, 300, 20, 30), torch.bfloat16), 1, EPS)),
}


def _expected(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    groups = x.double().reshape(batch, num_groups, channels // num_groups * height * width)
    return groups.mean(2), 1 / torch.sqrt(groups.var(2, correction=0) + EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((2, 24, 13, 17), 8),  # 3 channels each
        ((1, 128, 20, 33), 32),  # 4, several tiles
        ((2, 21, 7, 9), 3),  # 7
        ((2, 10, 5, 5), 10),  # 1
        ((2, 48, 9, 40), 6),  # 8
        ((1, 300, 9, 9), 1),  # several blocks of channels in one group
        ((3, 2, 2, 1), 1),
    ],
)
def test_equals_float64(
    shape: tuple[int, ...], num_groups: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2 + torch.randn(shape[1], 1, 1, generator=generator)
    x = x.to(kernel_device, dtype)
    mean, rstd = group_norm_statistics(x, num_groups, EPS)
    expected_mean, expected_rstd = _expected(x, num_groups)
    # Float32 sums of at most 1e5 values of order 1, added as trees.
    torch.testing.assert_close(mean.double(), expected_mean, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(rstd.double(), expected_rstd, atol=0, rtol=2e-6)


@pytest.mark.parametrize("mean", [1e3, -1e5])
def test_large_mean(mean: float, kernel_device: torch.device) -> None:
    """Deviations from the mean are squared, so that the only large rounding error is the one of the mean."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn((1, 24, 30, 30), generator=generator) + mean).to(kernel_device)
    found_mean, rstd = group_norm_statistics(x, 6, EPS)
    expected_mean, expected_rstd = _expected(x, 6)
    step = abs(mean) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found_mean.double(), expected_mean, atol=2 * step, rtol=0)
    torch.testing.assert_close(rstd.double(), expected_rstd, atol=0, rtol=step + 2e-6)


def test_constant_and_not_finite(kernel_device: torch.device) -> None:
    x = torch.full((1, 8, 3, 5), 7.0, device=kernel_device)
    mean, rstd = group_norm_statistics(x, 2, EPS)
    assert mean.tolist() == [[7.0, 7.0]]
    assert rstd[0, 0].item() == pytest.approx(EPS**-0.5, rel=1e-6)
    x[0, 0, 1, 1] = float("nan")
    mean, rstd = group_norm_statistics(x, 2, EPS)
    assert mean.isnan().tolist() == rstd.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)])
def test_empty(shape: tuple[int, ...], kernel_device: torch.device) -> None:
    mean, rstd = group_norm_statistics(torch.zeros(shape, device=kernel_device), 4, EPS)
    assert mean.shape == rstd.shape == (shape[0], 4)
    assert (mean == 0).all()
    torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5))


def test_layouts_agree(kernel_device: torch.device) -> None:
    x = torch.randn((2, 12, 5, 7), generator=torch.Generator().manual_seed(0)).to(kernel_device)
    expected = group_norm_statistics(x.contiguous(memory_format=torch.channels_last), 3, EPS)
    for other in (x, torch.stack([x, x], dim=-1)[..., 0]):
        assert all(map(torch.equal, group_norm_statistics(other, 3, EPS), expected))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles(name: str, capability: int, compiled: dict[str, Any]) -> None:
    check_compiled(compiled[name], LAUNCHES[name], capability)
    check_traced(compiled[name])

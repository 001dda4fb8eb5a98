from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from support.compile_kernels import CAPABILITIES, Launch
from support.kernel_checks import check_compiled, check_traced
from support.norm_samples import assert_close, meta_map, random

pytest.importorskip("triton", reason="Triton is not installed")

from panfpn_fast.ops.triton.bilinear_upsample_backward import bilinear_upsample_backward

LAUNCHES = {
    "logits": Launch(bilinear_upsample_backward, (meta_map((2, 54, 200, 336)), 2)),
    "logits, float32": Launch(bilinear_upsample_backward, (meta_map((1, 54, 200, 336), torch.float32), 2)),
    "odd channels": Launch(bilinear_upsample_backward, (meta_map((1, 133, 100, 168)), 2)),
    **{
        f"factor {s}": Launch(bilinear_upsample_backward, (meta_map((1, 128, 50 * s, 84 * s)), s))
        for s in (1, 2, 3, 4, 8)
    },
}


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(2, 20, 3, 5), (1, 5, 9, 2), (1, 16, 1, 1)])
def test_equals_float64(shape: tuple[int, int, int, int], factor: int, kernel_device: torch.device) -> None:
    batch, channels, height, width = shape
    grad = random((batch, channels, height * factor, width * factor), seed=factor)
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    upsampled = F.interpolate(x, scale_factor=float(factor), mode="bilinear")
    (expected,) = torch.autograd.grad(upsampled, x, grad.double())
    assert_close(bilinear_upsample_backward(grad.to(kernel_device), factor).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, kernel_device: torch.device) -> None:
    grad = random((1, 6, 6, 10), seed=0).to(dtype)
    expected = bilinear_upsample_backward(grad.float().to(kernel_device), 2)
    actual = bilinear_upsample_backward(grad.to(kernel_device), 2)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_close(actual.cpu(), expected.cpu())


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_footprint_is_exact(factor: int, kernel_device: torch.device) -> None:
    """A pixel gathers only from the outputs that read it, so NaN elsewhere does not reach it."""
    width, first = 7, 2 * factor
    weights = F.interpolate(torch.eye(width)[None], scale_factor=float(factor), mode="linear")[
        0
    ]  # [pixel, output]
    grad = torch.ones(1, 1, factor, width * factor)
    grad[..., first] = float("nan")
    gathered = bilinear_upsample_backward(grad.to(kernel_device), factor)[0, 0, 0].isnan()
    assert gathered.tolist() == (weights[:, first] != 0).tolist()


def test_empty(kernel_device: torch.device) -> None:
    assert bilinear_upsample_backward(torch.zeros(0, 3, 4, 4, device=kernel_device), 2).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles(name: str, capability: int, compiled: dict[str, Any]) -> None:
    check_compiled(compiled[name], LAUNCHES[name], capability)
    check_traced(compiled[name])

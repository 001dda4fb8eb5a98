from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.compile_kernels import CAPABILITIES, Launch
from support.kernel_checks import check_compiled, check_traced
from support.norm_samples import EPS, assert_close, meta_map, meta_norm, random

pytest.importorskip("triton", reason="Triton is not installed")

from panfpn_fast.ops import group_norm_relu_upsample
from panfpn_fast.ops.triton.group_norm_relu_upsample import group_norm_relu_upsample as upsample
from panfpn_fast.ops.triton.group_norm_relu_upsample import (
    group_norm_relu_upsample_backward as upsample_backward,
)


def _forward(
    channels: int, groups: int, factor: int, added: bool, dtype: torch.dtype = torch.bfloat16
) -> Launch:
    x, large = (
        meta_map((2, channels, 50, 84), dtype),
        meta_map((2, channels, 50 * factor, 84 * factor), dtype),
    )
    return Launch(upsample, (x, *meta_norm(x, groups), factor, large if added else None))


def _backward(channels: int, groups: int, factor: int, dtype: torch.dtype = torch.bfloat16) -> Launch:
    x, large = (
        meta_map((2, channels, 50, 84), dtype),
        meta_map((2, channels, 50 * factor, 84 * factor), dtype),
    )
    return Launch(upsample_backward, (large, x, *meta_norm(x, groups), factor))


LAUNCHES = {
    **{f"forward, factor {s}": _forward(128, 32, s, False) for s in (1, 2, 3, 4, 8)},
    **{f"forward with residual, factor {s}": _forward(128, 32, s, True) for s in (1, 2, 3, 4, 8)},
    "forward, float32": _forward(128, 32, 2, True, torch.float32),
    "forward, float16, 64 channels": _forward(64, 32, 2, True, torch.float16),
    "forward, 256 channels": _forward(256, 32, 2, True),
    "forward, odd channels": _forward(33, 11, 2, True),
    **{f"backward, factor {s}": _backward(128, 32, s) for s in (1, 2, 3, 4, 8)},
    "backward, float32": _backward(128, 32, 2, torch.float32),
    "backward, float32, factor 1": _backward(128, 32, 1, torch.float32),
    "backward, float16, 64 channels": _backward(64, 32, 2, torch.float16),
    "backward, 256 channels": _backward(256, 32, 2),
    "backward, odd channels": _backward(33, 11, 2),
    "backward, one group": _backward(128, 1, 2),
}


def _inputs(
    shape: tuple[int, int, int, int], factor: int, added: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    batch, channels, height, width = shape
    large = (batch, channels, height * factor, width * factor)
    x = (2 * random(shape, 0) + 0.3).to(dtype)
    return x, random((channels,), 1), random((channels,), 2), random(large, 3).to(dtype) if added else None


def _expected(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, factor: int, residual: Tensor | None
) -> Tensor:
    output = F.relu(F.group_norm(x, groups, weight, bias, EPS))
    if factor > 1:
        output = F.interpolate(output, scale_factor=float(factor), mode="bilinear")
    return output if residual is None else output + residual


SHAPES = [
    ((2, 24, 3, 4), 8),  # 3 channels in a group
    ((1, 7, 5, 1), 1),  # 7, one group, a column
    ((1, 10, 1, 9), 5),  # 2, a row
    ((1, 16, 3, 3), 2),  # 8
    ((1, 5, 2, 3), 5),  # 1
]


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_equals_float64(
    shape: tuple[int, int, int, int], groups: int, factor: int, triton_ops: torch.device
) -> None:
    """Checks the forward and every gradient through the public function."""
    inputs = _inputs(shape, factor, factor % 2 == 0, torch.float32)
    present = [value for value in inputs if value is not None]
    leaves = [value.to(triton_ops).requires_grad_() for value in present]
    residual = leaves[3] if len(leaves) > 3 else None
    output = group_norm_relu_upsample(leaves[0], leaves[1], leaves[2], groups, EPS, factor, residual)
    exact = [value.double().requires_grad_() for value in present]
    expected = _expected(
        exact[0], exact[1], exact[2], groups, factor, exact[3] if residual is not None else None
    )
    assert_close(output.cpu(), expected)
    assert output.is_contiguous(memory_format=torch.channels_last)

    grad = random(tuple(output.shape), 4)
    gradients = torch.autograd.grad(output, leaves, grad.to(triton_ops))
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_close(actual.cpu(), wanted, 4)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, factor: int, triton_ops: torch.device) -> None:
    inputs = _inputs((1, 12, 3, 5), factor, True, dtype)
    leaves = [value.to(triton_ops).requires_grad_() for value in inputs if value is not None]
    output = group_norm_relu_upsample(leaves[0], leaves[1], leaves[2], 3, EPS, factor, leaves[3])
    exact = [value.double().requires_grad_() for value in inputs if value is not None]
    expected = _expected(exact[0], exact[1], exact[2], 3, factor, exact[3])
    assert output.dtype == dtype
    assert_close(output.cpu(), expected)
    grad = random(tuple(output.shape), 4).to(dtype)
    gradients = torch.autograd.grad(output, leaves, grad.to(triton_ops))
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        # The gathered gradient and the result are rounded.
        assert_close(actual.cpu(), wanted, 2)


def test_large_mean(triton_ops: torch.device) -> None:
    x, weight, bias, _ = _inputs((1, 8, 4, 5), 2, False, torch.float32)
    x = x + 1000.0
    output = group_norm_relu_upsample(x.to(triton_ops), weight.to(triton_ops), bias.to(triton_ops), 2, EPS)
    expected = _expected(x.double(), weight.double(), bias.double(), 2, 2, None)
    # Values near 1000 and their mean have a spacing of 6e-5, at a standard deviation of 2.
    torch.testing.assert_close(output.cpu().double(), expected, atol=3e-4, rtol=0)


def test_nan_stays(triton_ops: torch.device) -> None:
    x, weight, bias, _ = (value for value in _inputs((1, 4, 2, 3), 2, False, torch.float32))
    assert x is not None
    assert weight is not None
    assert bias is not None
    x[0, 0, 1, 1] = float("nan")
    output = group_norm_relu_upsample(x.to(triton_ops), weight.to(triton_ops), bias.to(triton_ops), 2, EPS)
    assert output[0, :2].isnan().all()
    assert not output[0, 2:].isnan().any()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (1, 4, 0, 3)])
def test_empty(shape: tuple[int, int, int, int], triton_ops: torch.device) -> None:
    inputs = [
        torch.zeros(size, device=triton_ops, requires_grad=True) for size in (shape, shape[1:2], shape[1:2])
    ]
    output = group_norm_relu_upsample(*inputs, 2, EPS)  # type: ignore[arg-type, call-arg, misc]
    assert output.shape == (shape[0], 4, 2 * shape[2], 6)
    gradients = torch.autograd.grad(output, inputs, torch.zeros_like(output))
    assert gradients[0].shape == shape
    assert gradients[1].tolist() == gradients[2].tolist() == [0.0] * 4


def test_second_derivative_is_refused(triton_ops: torch.device) -> None:
    x, weight, bias, _ = _inputs((1, 4, 2, 2), 1, False, torch.float32)
    x = x.to(triton_ops).requires_grad_()
    output = group_norm_relu_upsample(x, weight.to(triton_ops), bias.to(triton_ops), 2, EPS, 1)
    (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles(name: str, capability: int, compiled: dict[str, Any]) -> None:
    check_compiled(compiled[name], LAUNCHES[name], capability)
    check_traced(compiled[name])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in LAUNCHES if name.startswith("forward")][:-1])
def test_outputs_are_stored_16_bytes_at_once(name: str, capability: int, compiled: dict[str, Any]) -> None:
    (kernel,) = compiled[name]["kernels"]
    stores = {op for op in kernel["targets"][str(capability)]["instructions"] if op.startswith("st.global")}
    assert stores
    assert all(".v4.b32" in op or ".v8.b32" in op for op in stores), stores

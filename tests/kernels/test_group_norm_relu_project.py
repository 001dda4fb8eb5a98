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

from panfpn_fast.ops import conv_gn_relu_project
from panfpn_fast.ops.triton import group_norm_relu_project as module
from panfpn_fast.ops.triton.group_norm_relu_project import group_norm_relu_project

# The residual: none, of the size of the output, or half as large.
NONE, SAME, HALF = 0, 1, 2


def _launch(
    channels: int, outputs: int, residual: int, dtype: torch.dtype = torch.bfloat16, precision: str = "ieee"
) -> Launch:
    x = meta_map((2, channels, 100, 168), dtype)
    matrix = torch.empty(outputs, channels, dtype=dtype, device="meta")
    added = meta_map((2, outputs, 100 // residual, 168 // residual), dtype) if residual else None
    bias = torch.empty(outputs, dtype=dtype, device="meta") if residual != SAME else None
    args = (x, *meta_norm(x, 32 if channels % 32 == 0 else 3), matrix, bias, added)
    on_tensor_cores = dtype != torch.float32 or precision == "tf32"
    kernels = ("_project_kernel",) if on_tensor_cores else ()
    return Launch(_with_tf32 if precision == "tf32" else group_norm_relu_project, args, kernels)


def _with_tf32(*args: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "precision", lambda *_: "tf32")
        return group_norm_relu_project(*args)


LAUNCHES = {
    **{f"54 outputs, residual {residual}": _launch(128, 54, residual) for residual in (NONE, SAME, HALF)},
    "float16, 64 channels": _launch(64, 54, HALF, torch.float16),
    **{f"256 channels, residual {residual}": _launch(256, 54, residual) for residual in (NONE, SAME, HALF)},
    **{f"133 outputs, residual {residual}": _launch(128, 133, residual) for residual in (NONE, SAME, HALF)},
    "256 channels, 133 outputs": _launch(256, 133, HALF),
    "odd": _launch(33, 19, HALF),
    "float32": _launch(128, 54, HALF, torch.float32),
    "float32, 256 channels, 133 outputs": _launch(256, 133, HALF, torch.float32),
    "tf32": _launch(128, 54, HALF, torch.float32, "tf32"),
    "tf32, 256 channels, 133 outputs": _launch(256, 133, HALF, torch.float32, "tf32"),
}


def _inputs(
    channels: int, outputs: int, height: int, width: int, residual: int, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    added = random((2, outputs, height // residual, width // residual), 5).to(dtype) if residual else None
    return {
        "x": (2 * random((2, channels, height, width), 0) + 0.3).to(dtype),
        "weight": random((channels,), 1),
        "bias": random((channels,), 2),
        "matrix": (random((outputs, channels), 3) / channels**0.5).to(dtype),
        "matrix_bias": random((outputs,), 4).to(dtype) if residual != SAME else None,
        "residual": added,
    }


def _expected(inputs: dict[str, Tensor | None], groups: int) -> Tensor:
    x, weight, bias, matrix, matrix_bias, residual = inputs.values()
    assert x is not None
    assert matrix is not None
    activations = F.relu(F.group_norm(x, groups, weight, bias, EPS))
    output = F.conv2d(activations, matrix[:, :, None, None], matrix_bias)
    if residual is None:
        return output
    if residual.shape[2] != x.shape[2]:
        residual = F.interpolate(residual, scale_factor=2.0, mode="bilinear")
    return output + residual


def _run(inputs: dict[str, Tensor | None], groups: int) -> Tensor:
    x, weight, bias, matrix, matrix_bias, residual = inputs.values()
    ops = torch.ops.panfpn_fast
    assert x is not None
    mean, rstd = ops.group_norm_statistics(x.detach(), groups, EPS)
    output: Tensor = ops.group_norm_relu_project(x, mean, rstd, weight, bias, matrix, matrix_bias, residual)
    return output


def _leaves(
    inputs: dict[str, Tensor | None], device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, Tensor | None]:
    return {
        name: None if value is None else value.to(device, dtype or value.dtype).requires_grad_()
        for name, value in inputs.items()
    }


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
RESIDUALS = pytest.mark.parametrize("residual", [NONE, SAME, HALF])


@RESIDUALS
@DTYPES
@pytest.mark.parametrize(
    ("channels", "groups", "outputs", "height", "width"),
    [
        (24, 8, 5, 6, 10),
        (21, 3, 54, 2, 2),
        (144, 6, 70, 4, 6),  # several blocks of channels, and in float32 also of outputs
    ],
)
def test_equals_float64(
    channels: int,
    groups: int,
    outputs: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    residual: int,
    triton_ops: torch.device,
) -> None:
    inputs = _inputs(channels, outputs, height, width, residual, dtype)
    output = _run(_leaves(inputs, triton_ops), groups)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=torch.channels_last)
    expected = _expected(_leaves(inputs, torch.device("cpu"), torch.float64), groups)
    assert_close(output.cpu(), expected, 2)  # the activations and the result are rounded


@RESIDUALS
@DTYPES
def test_gradients_equal_float64(dtype: torch.dtype, residual: int, triton_ops: torch.device) -> None:
    inputs = _inputs(12, 5, 4, 6, residual, dtype)
    leaves, exact = _leaves(inputs, triton_ops), _leaves(inputs, torch.device("cpu"), torch.float64)
    output, expected = _run(leaves, 3), _expected(exact, 3)
    grad = random(tuple(output.shape), 6).to(dtype)
    present = [value for value in leaves.values() if value is not None]
    wanted = [value for value in exact.values() if value is not None]
    gradients = torch.autograd.grad(output, present, grad.to(triton_ops))
    for actual, one in zip(gradients, torch.autograd.grad(expected, wanted, grad.double()), strict=True):
        assert_close(actual.cpu(), one, 4, dtype)  # the activations and their gradient are rounded too


@pytest.mark.parametrize("residual", [NONE, SAME])
def test_odd_sizes(residual: int, triton_ops: torch.device) -> None:
    inputs = _inputs(18, 19, 7, 13, residual, torch.float32)
    exact = _leaves(inputs, torch.device("cpu"), torch.float64)
    assert_close(_run(_leaves(inputs, triton_ops), 6).cpu(), _expected(exact, 6))


def test_public_function(triton_ops: torch.device) -> None:
    if triton_ops.type == "cuda":
        pytest.skip("the convolution may use tf32 on a GPU")
    x, conv_weight = random((1, 4, 6, 4), 0), random((12, 4, 3, 3), 1) / 6
    gn = (1 + random((12,), 2) / 4, random((12,), 3) / 4)
    weight, bias, residual = random((7, 12), 4) / 3, random((7,), 5), random((1, 7, 3, 2), 6)
    leaves = [value.clone().requires_grad_() for value in (x, conv_weight, *gn, weight, bias, residual)]
    output = conv_gn_relu_project(*leaves[:4], 3, *leaves[4:6], EPS, leaves[6])  # type: ignore[arg-type, call-arg]
    exact = [value.double().requires_grad_() for value in (x, conv_weight, *gn, weight, bias, residual)]
    y = F.relu(F.group_norm(F.conv2d(exact[0], exact[1], padding=1), 3, exact[2], exact[3], EPS))
    expected = F.conv2d(y, exact[4][:, :, None, None], exact[5])
    expected = expected + F.interpolate(exact[6], scale_factor=2.0, mode="bilinear")
    assert_close(output, expected)
    grad = random(tuple(output.shape), 7)
    gradients = torch.autograd.grad(output, leaves, grad)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_close(actual, wanted)


def test_nan_stays(triton_ops: torch.device) -> None:
    inputs = _inputs(8, 3, 2, 2, NONE, torch.float32)
    x = inputs["x"]
    assert x is not None
    x[0, 0, 0, 0] = float("nan")  # the NaN spreads to its whole group, and so to all logits of the image
    output = _run({name: None if v is None else v.to(triton_ops) for name, v in inputs.items()}, 2)
    assert output[0].isnan().all()
    assert not output[1].isnan().any()


def test_empty(triton_ops: torch.device) -> None:
    inputs = _inputs(8, 3, 2, 2, NONE, torch.float32)
    empty = {name: None if value is None else value.to(triton_ops) for name, value in inputs.items()}
    assert empty["x"] is not None
    empty["x"] = empty["x"][:0]
    assert _run(empty, 2).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles(name: str, capability: int, compiled: dict[str, Any]) -> None:
    check_compiled(compiled[name], LAUNCHES[name], capability)
    check_traced(compiled[name])

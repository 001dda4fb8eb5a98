from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panfpn_fast.ops import group_norm_relu_upsample, reference
from support.op_checks import OPS, Sample, Tolerance, run_op_checks
from support.op_samples import generator, random_features

NHWC = torch.channels_last


def tolerance(dtype: torch.dtype) -> Tolerance:
    """Returns the tolerance for upsampled normalised values up to 4 and weight gradients that sum up to 2000 values."""
    if dtype == torch.float64:
        return Tolerance("Sums of up to 2000 terms in a different order.", 1e-11, 1e-11)
    reason = "Sums of up to 2000 float32 terms in a different order, and the terms largely cancel."
    return Tolerance(reason, 1e-4, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


def parameters(channels: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(2, channels, generator=generator(seed)).to(dtype)
    return weight, bias


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    def sample(
        shape: tuple[int, ...], groups: int, factor: int, residual: bool = False, wide: bool = False
    ) -> Sample:
        batch, channels, height, width = shape
        x = random_features(shape, seed=height).to(dtype)
        weight, bias = parameters(channels, torch.float32 if wide else dtype, seed=channels)
        large = (batch, channels, factor * height, factor * width)
        added = random_features(large, seed=width).to(dtype) if residual else None
        args = (x, weight, bias, groups, 1e-5, factor, added)
        return Sample(args, {}, tolerance(dtype)).map_tensors(lambda tensor: tensor.to(device))

    return [
        sample((2, 8, 13, 17), 4, 2),
        sample((3, 70, 9, 21), 7, 2, wide=True),
        sample((2, 12, 7, 19), 6, 2, residual=True),
        sample((3, 20, 5, 11), 5, 4, residual=True),
        sample((2, 9, 6, 35), 3, 3),
        sample((2, 34, 7, 18), 17, 1, residual=True),
        sample((0, 6, 5, 7), 3, 2, residual=True),
        sample((2, 6, 0, 7), 3, 2),
        sample((2, 16, 1, 1), 2, 2),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["group_norm_relu_upsample"], make_samples(dtype, device))


def composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    scale_factor: int = 2,
    residual: Tensor | None = None,
) -> Tensor:
    """Computes the same with PyTorch's own functions."""
    output = F.relu(F.group_norm(x, num_groups, weight, bias, eps))
    output = F.interpolate(output, scale_factor=float(scale_factor), mode="bilinear", align_corners=False)
    return output if residual is None else output + residual


@pytest.mark.parametrize("scale_factor", [1, 2, 3, 4, 7])
def test_reference_equals_torch(scale_factor: int) -> None:
    x = random_features((2, 12, 6, 9), 0).double()
    weight, bias = parameters(12, torch.float64, 0)
    residual = random_features((2, 12, 6 * scale_factor, 9 * scale_factor), 1).double()
    args = (x, weight, bias, 4, 1e-3, scale_factor, residual)
    torch.testing.assert_close(
        reference.group_norm_relu_upsample(*args), composed(*args), atol=1e-12, rtol=1e-12
    )


def test_reference_has_the_same_signature() -> None:
    signature = inspect.signature(group_norm_relu_upsample)
    assert signature == inspect.signature(reference.group_norm_relu_upsample)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
)
def test_any_size(
    batch: int, groups: int, size: int, height: int, width: int, factor: int, nhwc: bool, add: bool
) -> None:
    channels = groups * size
    x = random_features((batch, channels, height, width), 0).double()
    weight, bias = parameters(channels, torch.float64, 1)
    large = (batch, channels, height * factor, width * factor)
    residual = random_features(large, 2).double() if add else None
    if nhwc:
        x = x.contiguous(memory_format=NHWC)
    leaves = [x, weight, bias] if residual is None else [x, weight, bias, residual]
    for leaf in leaves:
        leaf.requires_grad_()
    args = (x, weight, bias, groups, 1e-5, factor, residual)
    actual, expected = group_norm_relu_upsample(*args), reference.group_norm_relu_upsample(*args)
    # A group of one value has that value as its mean. A rounding error of the difference is divided by sqrt(eps), which
    # makes it 300 times as large.
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)
    grad = random_features(large, 3).double()
    for got, wanted in zip(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


def test_known_values(device: torch.device) -> None:
    # Two groups of one channel each, with means 2 and -1 and variances 1 and 4.
    x = torch.tensor([[1.0, 3.0], [-3.0, 1.0]], device=device).reshape(1, 2, 1, 2)
    weight, bias = torch.tensor([2.0, -1.0], device=device), torch.tensor([1.0, 0.5], device=device)
    output = group_norm_relu_upsample(x, weight, bias, 2, 1e-12)
    # The normalised values are -1 and 1. This gives 2 * -1 + 1 < 0 and 3 in one channel, 1.5 and -0.5 < 0 in the other.
    expected = torch.tensor([[0.0, 0.75, 2.25, 3.0], [1.5, 1.125, 0.375, 0.0]], device=device)
    torch.testing.assert_close(output, expected[None, :, None].expand(1, 2, 2, 4))
    output = group_norm_relu_upsample(x, weight, bias, 2, 1e-12, 1, torch.full_like(x, 10.0))
    torch.testing.assert_close(output.flatten(), torch.tensor([10.0, 13.0, 11.5, 10.0], device=device))


def test_constant_map(device: torch.device) -> None:
    x = torch.full((2, 4, 3, 5), 7.0, device=device)
    bias = torch.tensor([-1.0, 0.0, 1.0, 2.0], device=device)
    output = group_norm_relu_upsample(x, torch.ones(4, device=device), bias, 2)
    expected = bias.clamp(min=0)[:, None, None].expand(2, 4, 6, 10)
    # The mean times 1 / sqrt(eps) is 2200, where float32 has steps of 2.4e-4.
    torch.testing.assert_close(output, expected, atol=3e-4, rtol=0.0)


@pytest.mark.parametrize("nhwc", [False, True])
def test_nan_fills_its_group(nhwc: bool, device: torch.device) -> None:
    x = random_features((2, 36, 5, 19), 0).to(device)
    x[1, 7, 2, 3] = float("nan")
    x[0, 13, 1, 1] = float("inf")
    weight, bias = torch.ones(36, device=device), torch.zeros(36, device=device)
    if nhwc:
        x = x.contiguous(memory_format=NHWC)
    for factor in (1, 2, 3):
        nans = group_norm_relu_upsample(x, weight, bias, 12, 1e-5, factor).isnan()
        assert nans[1, 6:9].all()
        assert nans[0, 12:15].all()
        assert nans.sum() == 6 * nans[0, 0].numel()


def test_output_and_gradient_follow_the_layout_of_the_input() -> None:
    weight, bias = parameters(20, torch.float32, 0)
    x = random_features((2, 20, 5, 7), 0).requires_grad_()
    for leaf, nhwc in ((x, False), (x.detach().contiguous(memory_format=NHWC).requires_grad_(), True)):
        output = group_norm_relu_upsample(leaf, weight, bias, 5)
        (grad,) = torch.autograd.grad(output.square().sum(), leaf)
        for tensor in (output, grad):
            assert tensor.is_contiguous() != nhwc
            assert tensor.is_contiguous(memory_format=NHWC) == nhwc


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    x = random_features((2, 64, 20, 30), 0).to(device, dtype)
    weight, bias = (parameter.to(device) for parameter in parameters(64, torch.float32, 0))
    exact = reference.group_norm_relu_upsample(x.double(), weight.double(), bias.double(), 8)
    ours = group_norm_relu_upsample(x, weight, bias, 8)
    # Half a rounding step, plus the errors of the float32 sums.
    error = (ours.double() - exact).abs() - exact.abs() * torch.finfo(dtype).eps / 2
    assert error.max() <= 1e-5


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nhwc", [False, True])
def test_number_of_threads_does_not_matter(dtype: torch.dtype, nhwc: bool, threads: int) -> None:
    """The map is large enough for three threads, and the bands of rows do not end at the end of an image."""
    x = random_features((2, 40, 61, 67), 0).to(dtype)
    residual = random_features((2, 40, 122, 134), 1).to(dtype)
    layout = NHWC if nhwc else torch.contiguous_format
    x, residual = x.contiguous(memory_format=layout), residual.contiguous(memory_format=layout)
    weight, bias = parameters(40, torch.float32, 0)

    def results() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        output = group_norm_relu_upsample(leaves[0], leaves[1], leaves[2], 8, residual=residual)
        adjoint = torch.ops.panfpn_fast.bilinear_upsample_backward(residual, 2)
        return [output, adjoint, *torch.autograd.grad(output, leaves, residual)]

    here = results()
    torch.set_num_threads(1)
    for got, wanted in zip(here, results(), strict=True):
        assert torch.equal(got, wanted)


def statistics(x: Tensor, num_groups: int, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    mean, rstd = torch.ops.panfpn_fast.group_norm_statistics(x, num_groups, eps)
    return mean, rstd


def exact_statistics(x: Tensor, num_groups: int, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    groups = x.double().reshape(x.shape[0], num_groups, -1)
    return groups.mean(2), (groups.var(2, unbiased=False) + eps).rsqrt()


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 37, 41), (1, 6, 200, 211), (3, 260, 3, 5)], ids=str)
def test_statistics_do_not_cancel(shape: tuple[int, ...], nhwc: bool, device: torch.device) -> None:
    x = (random_features(shape, 0) + 1e4).to(device)
    if nhwc:
        x = x.contiguous(memory_format=NHWC)
    mean, rstd = statistics(x, 2)
    exact_mean, exact_rstd = exact_statistics(x, 2)
    # The mean is rounded once. A sum of squares around 1e8 would lose the variance of 1. With six channels, one lane
    # sums up to 5461 squares in float32 (measured error: 2.2e-6; 1.5e-7 in the other cases).
    torch.testing.assert_close(mean.double(), exact_mean, atol=0.0, rtol=2**-24)
    torch.testing.assert_close(rstd.double(), exact_rstd, atol=0.0, rtol=4e-6)


@pytest.mark.parametrize("nhwc", [False, True])
def test_statistics_with_outliers_at_the_start_of_a_block(nhwc: bool, device: torch.device) -> None:
    """Blocks are summed relative to the mean of their first values, which here are far from all other values."""
    x = random_features((1, 32, 64, 64), 0)
    x[:, :, :1, :4] += 1e5
    x = x.to(device)
    if nhwc:
        x = x.contiguous(memory_format=NHWC)
    mean, rstd = statistics(x, 4)
    exact_mean, exact_rstd = exact_statistics(x, 4)
    # Squares are up to nine times as large as relative to the true mean, and so are their rounding errors.
    torch.testing.assert_close(mean.double(), exact_mean, atol=0.0, rtol=1e-5)
    torch.testing.assert_close(rstd.double(), exact_rstd, atol=0.0, rtol=1e-5)


def test_statistics_of_a_map_far_from_zero_normalise_it(device: torch.device) -> None:
    x = (random_features((1, 32, 40, 40), 0) + 1e4).to(device)
    weight, bias = torch.ones(32, device=device), torch.zeros(32, device=device)
    exact = reference.group_norm_relu_upsample(x.double(), weight.double(), bias.double(), 4)
    error = (group_norm_relu_upsample(x, weight, bias, 4).double() - exact).abs().max()
    # A float32 mean near 1e4 is accurate to 5e-4, and the cancellation in x * scale + shift adds the same error.
    assert error < 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("nhwc", [False, True])
def test_bilinear_upsample_backward(
    dtype: torch.dtype, factor: int, nhwc: bool, device: torch.device
) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    op = torch.ops.panfpn_fast.bilinear_upsample_backward
    for shape in ((2, 70, 6, 19), (1, 5, 1, 1), (2, 3, 11, 40), (1, 16, 2, 1)):
        batch, channels, height, width = shape
        grad = random_features((batch, channels, height * factor, width * factor), factor).to(device, dtype)
        low = torch.zeros(shape, dtype=wide, device=device, requires_grad=True)
        large = F.interpolate(low, scale_factor=float(factor), mode="bilinear", align_corners=False)
        (expected,) = torch.autograd.grad(large, low, grad.to(wide))
        if nhwc:
            grad = grad.contiguous(memory_format=NHWC)
        actual = op(grad, factor)
        assert actual.is_contiguous(memory_format=NHWC if nhwc else torch.contiguous_format)
        near = tolerance(dtype)
        torch.testing.assert_close(actual, expected.to(dtype), atol=near.absolute, rtol=near.relative)
    if factor == 2:
        torch.library.opcheck(op.default, (grad, factor))


def test_only_requested_gradients_are_computed() -> None:
    x, residual = random_features((1, 4, 3, 5), 0), random_features((1, 4, 6, 10), 1)
    weight, bias = parameters(4, torch.float32, 0)
    grad = random_features((1, 4, 6, 10), 2)
    residual.requires_grad_()
    output = group_norm_relu_upsample(x, weight, bias, 2, residual=residual)
    assert torch.equal(torch.autograd.grad(output, residual, grad)[0], grad)
    bias.requires_grad_()
    output = group_norm_relu_upsample(x, weight, bias, 2, residual=residual)
    (bias_grad,) = torch.autograd.grad(output, bias, grad)
    expected = torch.autograd.grad(composed(x, weight, bias, 2), bias, grad)[0]
    torch.testing.assert_close(bias_grad, expected)


def test_no_second_derivative() -> None:
    x = random_features((1, 4, 3, 5), 0).requires_grad_()
    output = group_norm_relu_upsample(x, torch.ones(4), torch.zeros(4), 2)
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_gradient_that_is_an_expanded_scalar() -> None:
    x = random_features((2, 8, 5, 7), 0).requires_grad_()
    weight, bias = parameters(8, torch.float32, 0)
    (actual,) = torch.autograd.grad(group_norm_relu_upsample(x, weight, bias, 4).sum(), x)
    (expected,) = torch.autograd.grad(composed(x, weight, bias, 4).sum(), x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


X = torch.zeros(2, 8, 3, 5)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("x", [[1.0]], TypeError),
        ("x", X.long(), TypeError),
        ("x", X[0], ValueError),
        ("weight", None, TypeError),
        ("weight", torch.ones(8).double(), TypeError),
        ("weight", torch.ones(7), ValueError),
        ("weight", torch.ones(8, 1), ValueError),
        ("bias", torch.ones(8).half(), TypeError),
        ("bias", torch.ones(9), ValueError),
        ("bias", torch.ones(8, device="meta"), ValueError),
        ("num_groups", 4.0, TypeError),
        ("num_groups", 0, ValueError),
        ("num_groups", 3, ValueError),
        ("eps", "1", TypeError),
        ("eps", 0.0, ValueError),
        ("eps", float("nan"), ValueError),
        ("scale_factor", 2.0, TypeError),
        ("scale_factor", 0, ValueError),
        ("scale_factor", 2**40, ValueError),
        ("residual", [1.0], TypeError),
        ("residual", torch.zeros(2, 8, 6, 10).double(), TypeError),
        ("residual", torch.zeros(2, 8, 3, 5), ValueError),
        ("residual", torch.zeros(8, 6, 10), ValueError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {
        "x": X,
        "weight": torch.ones(8),
        "bias": torch.zeros(8),
        "num_groups": 4,
        argument: value,
    }
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        group_norm_relu_upsample(**arguments)


def test_dispatcher_ops_guard_memory() -> None:
    ops = torch.ops.panfpn_fast
    mean, weight, large = torch.zeros(2, 4), torch.zeros(8), torch.zeros(2, 8, 6, 10)
    bad: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.group_norm_statistics, (X, 3, 1e-5)),
        (ops.group_norm_statistics, (X[0], 4, 1e-5)),
        (ops.group_norm_relu_upsample, (X, mean[:1], mean[:1], weight, weight, 2, None)),
        (ops.group_norm_relu_upsample, (X, mean, mean.double(), weight, weight, 2, None)),
        (ops.group_norm_relu_upsample, (X, mean, mean, weight[:7], weight, 2, None)),
        (ops.group_norm_relu_upsample, (X, mean, mean, weight, weight, 0, None)),
        (ops.group_norm_relu_upsample, (X, mean, mean, weight, weight, 2, X)),
        (ops.group_norm_relu_upsample_backward, (X, X, mean, mean, weight, weight, 2)),
        (ops.group_norm_relu_upsample_backward, (large.double(), X, mean, mean, weight, weight, 2)),
        (ops.bilinear_upsample_backward, (X, 2)),
        (ops.bilinear_upsample_backward, (X, 0)),
    ]
    for op, args in bad:
        with pytest.raises(RuntimeError):
            op(*args)

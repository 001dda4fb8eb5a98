"""Pooling and its gradient equal the reference on any boxes, maps and sizes that hypothesis thinks of."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_checks import averaging_tolerance
from torch import Tensor

from panfpn_fast.ops import multiscale_roi_align, reference, roi_align

# The fixture that poisons fresh memory holds for all examples alike.
LIMITS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SMALL = st.floats(-40, 80, width=32)
COORDINATES = st.one_of(
    SMALL,
    st.integers(-3, 40).map(float),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38, -3e38, 1e9, 0.0, -0.0]),
)


@st.composite
def rois(draw: st.DrawFn) -> Tensor:
    """Rows [K, 5], ordinary, touching, inverted, endless and of no image."""
    row = st.tuples(st.sampled_from([0.0, 1.0, 1.0, -1.0, 2.0, math.nan]), *[COORDINATES] * 4)
    return torch.tensor(draw(st.lists(row, max_size=8))).reshape(-1, 5)


@st.composite
def pooling(draw: st.DrawFn) -> tuple[tuple[int, int], int, bool]:
    size = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return size, draw(st.integers(-1, 3)), draw(st.booleans())


def check(function: object, twin: object, features: list[Tensor], *args: object) -> None:
    """Compares forward and the gradients for a random output gradient, in float32 and in both layouts."""
    assert callable(function)
    assert callable(twin)
    tolerance = averaging_tolerance(torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaves = [level.contiguous(memory_format=memory_format).requires_grad_() for level in features]
        actual, expected = function(leaves, *args), twin(leaves, *args)
        torch.testing.assert_close(actual, expected, atol=tolerance.absolute, rtol=tolerance.relative)
        grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(
            torch.autograd.grad(actual, leaves, grad),
            torch.autograd.grad(expected, leaves, grad),
            atol=tolerance.absolute,
            rtol=tolerance.relative,
        )


@given(
    rois=rois(),
    pooling=pooling(),
    channels=st.sampled_from([1, 3, 16, 19, 64, 83]),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    scale=st.sampled_from([1.0, 0.5, 0.25]),
)
@LIMITS
def test_roi_align(
    rois: Tensor,
    pooling: tuple[tuple[int, int], int, bool],
    channels: int,
    height: int,
    width: int,
    scale: float,
) -> None:
    features = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    size, sampling_ratio, aligned = pooling
    check(
        lambda maps, *args: roi_align(maps[0], *args),
        lambda maps, *args: reference.roi_align(maps[0], *args),
        [features],
        rois,
        size,
        scale,
        sampling_ratio,
        aligned,
    )


@given(
    rois=rois(),
    pooling=pooling(),
    channels=st.sampled_from([1, 17]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
)
@LIMITS
def test_multiscale_roi_align(
    rois: Tensor, pooling: tuple[tuple[int, int], int, bool], channels: int, height: int, width: int
) -> None:
    features = [
        torch.randn(2, channels, -(-height // s), -(-width // s), generator=torch.Generator().manual_seed(s))
        for s in (1, 2, 4)
    ]
    size, sampling_ratio, aligned = pooling
    scales = (1.0, 0.5, 0.25)
    args = (rois, size, scales, sampling_ratio, aligned, 8, 1)
    check(multiscale_roi_align, reference.multiscale_roi_align, features, *args)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_does_not_depend_on_the_number_of_threads(channels_last: bool) -> None:
    boxes = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) * 60
    boxes[:, 0] = 0
    features = torch.randn(1, 37, 33, 31)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    threads = torch.get_num_threads()
    grads = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        pooled = roi_align(features, boxes, 7, 0.5, 2, True)
        grads.append(torch.autograd.grad(pooled.square().sum(), features)[0])
    torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_second_derivative_is_refused() -> None:
    features = torch.randn(1, 3, 8, 8, requires_grad=True)
    pooled = roi_align(features, torch.tensor([[0.0, 1.0, 1.0, 6.0, 6.0]]), 2)
    (grad,) = torch.autograd.grad(pooled.square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_autocast_leaves_the_maps_as_they_are() -> None:
    """Mixed precision pools what it is given: nothing is cast, so nothing of the pyramid's size is copied."""
    boxes = [torch.tensor([[1.0, 1.0, 6.0, 6.0]])]
    features = torch.randn(1, 3, 8, 8, dtype=torch.bfloat16)
    outside = roi_align(features, boxes, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = roi_align(features, boxes, 2)
        from_float = roi_align(features.float(), boxes, 2)
    assert inside.dtype == torch.bfloat16
    assert from_float.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_large_channels_last_maps_that_are_read_in_blocks() -> None:
    """Large boxes that read each pixel of a map beyond the cache many times, and more boxes than are kept folded."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(1, 70, 130, 131, generator=random).contiguous(memory_format=torch.channels_last)
    corner = torch.rand(40, 2, generator=random) * 30
    large = torch.cat(
        [torch.zeros(40, 1), corner, corner + 80 + 20 * torch.rand(40, 2, generator=random)], dim=1
    )
    many = torch.cat([large, torch.tensor([[0.0, 3.0, 4.0, 9.0, 8.0]]).repeat(16400, 1)])
    expected = reference.roi_align(features, many[:41], 2, sampling_ratio=0, aligned=True)
    for rois in (large, many):
        pooled = roi_align(features, rois, 2, sampling_ratio=0, aligned=True)
        assert pooled.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(pooled[:41], expected[: len(rois)], rtol=1e-5, atol=2e-5)
        assert torch.equal(pooled[40:], pooled[40:41].expand(len(rois) - 40, -1, -1, -1))

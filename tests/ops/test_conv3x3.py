"""The Winograd convolution behind the stages of the semantic head on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_checks import channels_last
from op_samples import random_features
from torch import Tensor

from panfpn_fast.ops import conv_gn_relu_upsample


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    output: Tensor = torch.ops.panfpn_fast.conv3x3(x, weight)
    return output


def inputs(batch: int, channels: int, height: int, width: int, outputs: int) -> tuple[Tensor, Tensor]:
    """A map and weights, all of order one, whose results are of order one."""
    x = random_features((batch, channels, height, width), height)
    weight = random_features((outputs, channels, 3, 3), width)
    return channels_last(x), weight / (9 * channels) ** 0.5


SHAPES = [
    (2, 16, 1, 1, 16),
    (1, 16, 1, 9, 32),
    (1, 32, 2, 2, 48),
    (3, 48, 7, 13, 16),
    (2, 64, 10, 33, 144),
    (0, 16, 4, 4, 16),
    (1, 16, 0, 4, 16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, int, int, int, int]) -> None:
    x, weight = inputs(*shape)
    output = convolve(x, weight)
    assert output.shape == (shape[0], shape[4], *shape[2:4])
    assert output.is_contiguous(memory_format=torch.channels_last)
    if output.numel() == 0:
        return
    expected = F.conv2d(x.double(), weight.double(), padding=1).float()
    # Roundings of partial sums of order one.
    torch.testing.assert_close(output, expected, atol=5e-6, rtol=1e-6)
    # Whatever the layout.
    assert torch.equal(convolve(x.contiguous(), weight), output)
    assert torch.equal(convolve(x, channels_last(weight)), output)


def test_is_as_exact_as_torch() -> None:
    x, weight = inputs(1, 256, 26, 34, 64)
    exact = F.conv2d(x.double(), weight.double(), padding=1)

    def error(output: Tensor) -> float:
        return float((output - exact).square().mean().sqrt())

    assert error(convolve(x, weight)) <= 1.5 * error(F.conv2d(x, weight, padding=1))


def test_gradients() -> None:
    x, weight = inputs(2, 16, 9, 12, 32)
    weights = random_features((2, 32, 9, 12), 5)

    def gradients(dtype: torch.dtype, winograd: bool) -> tuple[Tensor, ...]:
        leaves = (x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())
        output = convolve(*leaves) if winograd else F.conv2d(*leaves, padding=1)
        return torch.autograd.grad(output, leaves, weights.to(dtype))

    for got, wanted in zip(gradients(torch.float32, True), gradients(torch.float64, False), strict=True):
        # Sums of a few hundred terms.
        torch.testing.assert_close(got, wanted.float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_dispatcher_op(wanted: tuple[bool, bool]) -> None:
    x, weight = inputs(1, 16, 5, 6, 16)
    arguments = (x.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1]))
    torch.library.opcheck(torch.ops.panfpn_fast.conv3x3.default, arguments)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(1, 16, 4, 4), torch.zeros(8, 16, 3, 3), "multiples of 16"),
        (torch.zeros(1, 8, 4, 4), torch.zeros(16, 8, 3, 3), "multiples of 16"),
        (torch.zeros(1, 16, 4, 4), torch.zeros(16, 32, 3, 3), "weight must be"),
        (torch.zeros(1, 16, 4, 4), torch.zeros(16, 16, 1, 1), "weight must be"),
        (torch.zeros(16, 4, 4), torch.zeros(16, 16, 3, 3), "input must be"),
        (torch.zeros(1, 16, 4, 4).double(), torch.zeros(16, 16, 3, 3).double(), "float32 only"),
    ],
)
def test_what_would_read_out_of_bounds_is_refused(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        convolve(x, weight)


def test_is_taken_for_large_float32_maps_only() -> None:
    x, weight = inputs(1, 16, 32, 32, 32)
    taken: list[bool] = []

    def stage(x: Tensor, weight: Tensor) -> None:
        with torch.profiler.profile() as profile:
            conv_gn_relu_upsample(x, weight, torch.ones(32), torch.zeros(32), 4)
        taken.append(any(event.key == "panfpn_fast::conv3x3" for event in profile.key_averages()))

    stage(x, weight)
    stage(x.contiguous(), weight)
    stage(x[:, :, :16], weight)
    stage(x[:, :8].contiguous(memory_format=torch.channels_last), weight[:, :8].contiguous())
    with torch.autocast("cpu", torch.bfloat16):
        stage(x, weight)
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert taken == [wide, False, False, False, False]

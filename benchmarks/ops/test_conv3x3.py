"""conv3x3 with bias and ReLU on the maps of a ResNet-50 network at 800 x 1344 pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops import conv3x3, winograd

from ..harness import peers
from ..harness.accuracy import forward_and_gradient, random_normal
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from ..harness.gradients import forward_backward
from ..harness.measuring import bfloat16_problem
from .test_conv_gn_relu_upsample import close
from .test_group_norm_relu_upsample import NCHW, NHWC


def _arguments(
    channels: int,
    height: int,
    width: int,
    batch: int,
    layout: torch.memory_format,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, height, width, generator=random).relu_()
    weight = torch.randn(channels, channels, 3, 3, generator=random) / (9 * channels) ** 0.5
    bias = torch.randn(channels, generator=random)
    maps = (tensor.to(dtype).contiguous(memory_format=layout) for tensor in (x, weight))
    return *maps, bias.to(dtype)


def _prepared_arguments(
    channels: int, height: int, width: int, batch: int, dtype: torch.dtype = torch.float32
) -> Arguments:
    x, weight, bias = _arguments(channels, height, width, batch, NHWC, dtype)
    return x, weight, bias, winograd.prepare(weight)


def _ours(x: Tensor, weight: Tensor, bias: Tensor, prepared: Tensor | None = None) -> Tensor:
    return conv3x3(x, weight, bias, relu=True, prepared=prepared)


def _eager(x: Tensor, weight: Tensor, bias: Tensor, prepared: Tensor | None = None) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, padding=1))


def _flops(arguments: Arguments) -> int:
    x, weight = arguments[:2]
    flops: int = 2 * x.shape[0] * x.shape[2] * x.shape[3] * weight.numel()
    return flops


def _cost(arguments: Arguments, output: Tensor) -> Cost:
    return Cost(bytes=nbytes(arguments[:3]) + nbytes(output), flops=_flops(arguments))


def _training_arguments(*size: Any) -> Arguments:
    x, weight, bias = _arguments(*size)
    return (x, weight), bias


def _training(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Wraps a function to return the gradients of x and of the weights."""
    return forward_backward(lambda leaves, bias: function(*leaves, bias))


def _training_cost(arguments: Arguments, gradients: Sequence[Tensor]) -> Cost:
    """Counts the convolution and its two adjoints."""
    leaves = arguments[0]
    return Cost(bytes=4 * nbytes(leaves[0]) + 2 * nbytes(leaves[1]), flops=3 * _flops(leaves))


def _close_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)


SIZES = [
    (256, 200, 336, 1),
    (256, 100, 168, 1),
    (256, 50, 84, 1),
    (256, 25, 42, 1),
    (64, 200, 336, 1),
    (128, 100, 168, 1),
    (512, 25, 42, 1),
    (256, 14, 14, 100),
]

_PEERS = [
    Peer("eager", _eager),
    Peer("torch.compile", peers.compiled(_eager), peers.compile_problem, full=True),
]

COMPARISON = Comparison(
    op="conv3x3",
    ours=_ours,
    peers=_PEERS,
    cases=[
        Case(
            f"{channels} to {channels} x {batch} x {height} x {width}, prepared",
            partial(_prepared_arguments, channels, height, width, batch),
            highlight=channels == 256 and height == 200,
        )
        for channels, height, width, batch in SIZES
    ],
    agree=close,
    cost=_cost,
)

HALF = Comparison(
    op="conv3x3",
    ours=_ours,
    peers=_PEERS,
    cases=[
        Case(
            f"{channels} to {channels} x {batch} x {height} x {width}, prepared, bfloat16",
            partial(_prepared_arguments, channels, height, width, batch, torch.bfloat16),
        )
        for channels, height, width, batch in (SIZES[0], SIZES[2], SIZES[4])
    ],
    agree=close,
    cost=_cost,
    devices=("cuda",) if bfloat16_problem(torch.device("cpu")) else ("cpu", "cuda"),
)

TRAINING = Comparison(
    op="conv3x3, forward and backward",
    ours=_training(_ours),
    peers=[Peer("eager", _training(_eager))],
    cases=[
        Case(f"256 to 256 x 100 x 168, {name}", partial(_training_arguments, 256, 100, 168, 1, layout))
        for name, layout in (("NCHW", NCHW), ("channels-last", NHWC))
    ],
    agree=_close_gradients,
    cost=_training_cost,
)


def _small() -> tuple[Tensor, ...]:
    return random_normal(1, 128, 26, 42), random_normal(64, 128, 3, 3, seed=4) / 34, random_normal(64, seed=5)


def _pytorch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def _by_weight(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes the weights the first argument, whose gradient is measured."""
    return lambda weight, x, bias: function(x, weight, bias)


def _small_by_weight() -> tuple[Tensor, ...]:
    x, weight, bias = _small()
    return weight, x, bias


ACCURACY = [
    *forward_and_gradient("conv3x3", _small, conv3x3, _pytorch),
    *forward_and_gradient("conv3x3, weights", _small_by_weight, _by_weight(conv3x3), _by_weight(_pytorch))[
        1:
    ],
]


@COMPARISON.rows()
def test_conv3x3(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@HALF.rows()
def test_conv3x3_half(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@TRAINING.rows()
def test_conv3x3_training(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)

"""conv_gn_relu_upsample in the first stage of the semantic head on P3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops import conv_gn_relu_upsample

from ..harness import peers
from ..harness.accuracy import forward_and_gradient, random_normal
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from ..harness.gradients import forward_backward
from ..harness.measuring import bfloat16_problem
from .test_group_norm_relu_upsample import NCHW, NHWC, eager, small_stage


def _arguments(dtype: torch.dtype, layout: torch.memory_format) -> Arguments:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 100, 168, generator=random)
    conv_weight = torch.randn(128, 256, 3, 3, generator=random) / 48
    gn_weight, gn_bias = torch.randn(2, 128, generator=random).to(dtype)
    maps = [tensor.to(dtype).contiguous(memory_format=layout) for tensor in (x, conv_weight)]
    return *maps, gn_weight, gn_bias, 32


def _eager(x: Tensor, conv_weight: Tensor, gn_weight: Tensor, gn_bias: Tensor, num_groups: int) -> Tensor:
    return eager(F.conv2d(x, conv_weight, padding=1), gn_weight, gn_bias, num_groups)


def _in_layout(layout: torch.memory_format) -> Callable[..., Tensor]:
    """Returns the eager peer that first converts the map and the weights to a layout, within its time."""

    def call(x: Tensor, conv_weight: Tensor, *rest: object) -> Tensor:
        maps = [tensor.contiguous(memory_format=layout) for tensor in (x, conv_weight)]
        return _eager(*maps, *rest)  # type: ignore[arg-type]

    return call


def _conv_flops(arguments: Arguments) -> int:
    x, conv_weight = arguments[:2]
    pixels: int = x.shape[0] * x.shape[2] * x.shape[3]
    flops: int = 2 * pixels * conv_weight.numel()
    return flops


def _cost(arguments: Arguments, output: Tensor) -> Cost:
    return Cost(bytes=nbytes(arguments) + nbytes(output), flops=_conv_flops(arguments))


def _training_cost(arguments: Arguments, gradients: Sequence[Tensor]) -> Cost:
    """Counts the convolution and its adjoint, since only the gradient of x is computed."""
    x, conv_weight = arguments[:2]
    large = 4 * nbytes(x) * conv_weight.shape[0] // x.shape[1]
    return Cost(bytes=2 * nbytes(arguments) + 2 * large + nbytes(gradients), flops=2 * _conv_flops(arguments))


def close(ours: Tensor, theirs: Tensor) -> None:
    """Requires equal results up to the rounding of the convolution and, in half precision, of each later step."""
    assert ours.shape == theirs.shape, f"shape {list(ours.shape)} and {list(theirs.shape)}"
    difference = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    allowed = 1e-3 if ours.dtype == torch.float32 else 4 * torch.finfo(ours.dtype).eps
    assert difference <= allowed, f"relative difference {difference:.2g}"


def _close_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)


def _cases() -> list[Case]:
    # Where bfloat16 is emulated, the convolution dominates the time of these rows.
    emulated = not torch.cuda.is_available() and bfloat16_problem(torch.device("cpu")) is not None
    return [
        Case(
            f"256 to 128 x 100 x 168, {layout}, {name}",
            partial(_arguments, dtype, memory_format),
            full=emulated and dtype == torch.bfloat16,
        )
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        for layout, memory_format in (("NCHW", NCHW), ("channels-last", NHWC))
    ]


COMPARISON = Comparison(
    op="conv_gn_relu_upsample",
    ours=conv_gn_relu_upsample,
    peers=[
        Peer("eager", _in_layout(NCHW)),
        Peer("eager channels-last", _in_layout(NHWC)),
        Peer("torch.compile", peers.compiled(_eager), peers.compile_problem, full=True),
    ],
    cases=_cases(),
    agree=close,
    cost=_cost,
)

TRAINING = Comparison(
    op="conv_gn_relu_upsample, forward and backward",
    ours=forward_backward(conv_gn_relu_upsample),
    peers=[
        Peer("eager", forward_backward(_in_layout(NCHW))),
        Peer("eager channels-last", forward_backward(_in_layout(NHWC))),
        Peer("torch.compile", forward_backward(peers.compiled(_eager)), peers.compile_problem, full=True),
    ],
    cases=_cases(),
    agree=_close_gradients,
    cost=_training_cost,
)


def small_conv_stage() -> tuple[Tensor, ...]:
    """Makes the input and weights of a small convolution, and GroupNorm's parameters."""
    _, gn_weight, gn_bias = small_stage()
    return random_normal(1, 128, 26, 42), random_normal(64, 128, 3, 3, seed=4) / 34, gn_weight, gn_bias


ACCURACY = forward_and_gradient(
    "conv_gn_relu_upsample",
    small_conv_stage,
    lambda x, conv_weight, gn_weight, gn_bias: conv_gn_relu_upsample(x, conv_weight, gn_weight, gn_bias, 32),
    lambda x, conv_weight, gn_weight, gn_bias: _eager(x, conv_weight, gn_weight, gn_bias, 32),
)


@COMPARISON.rows()
def test_conv_gn_relu_upsample(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@TRAINING.rows()
def test_conv_gn_relu_upsample_training(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)

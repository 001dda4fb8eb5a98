"""group_norm_relu_upsample in a stage of the semantic head after its convolution, from 1/8 to 1/4 of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops import group_norm_relu_upsample

from ..harness import peers
from ..harness.accuracy import forward_and_gradient, random_normal
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from ..harness.gradients import forward_backward

NCHW, NHWC = torch.contiguous_format, torch.channels_last

# Statistics (a difference, its square and two sums), normalisation, ReLU.
_NORM_FLOPS = 7
# Three products and sums of two values each, with what two columns share counted once.
_UPSAMPLE_FLOPS = 6


def _arguments(dtype: torch.dtype, layout: torch.memory_format) -> Arguments:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, 100, 168, generator=random).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, 128, generator=random).to(dtype)
    return x, weight, bias, 32


def eager(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> Tensor:
    """Computes the same with torch's functions."""
    x = F.relu(F.group_norm(x, num_groups, weight, bias))
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _in_layout(function: Callable[..., Tensor], layout: torch.memory_format) -> Callable[..., Tensor]:
    """Wraps a function to convert the map to a layout first; the conversion counts in its time."""
    return lambda x, *rest: function(x.contiguous(memory_format=layout), *rest)


def _cost(arguments: Arguments, output: Tensor) -> Cost:
    x = arguments[0]
    flops = _NORM_FLOPS * x.numel() + _UPSAMPLE_FLOPS * output.numel()
    return Cost(bytes=nbytes(arguments) + nbytes(output), flops=flops)


def _training_cost(arguments: Arguments, gradient: Sequence[Tensor]) -> Cost:
    x = arguments[0]
    large = 4 * nbytes(x)
    flops = 3 * (_NORM_FLOPS * x.numel() + 4 * _UPSAMPLE_FLOPS * x.numel())
    return Cost(bytes=2 * nbytes(arguments) + 2 * large + nbytes(gradient), flops=flops)


def _close(ours: Tensor, theirs: Tensor) -> None:
    """Requires equal results up to rounding; in half precision, peers also round the statistics and each step."""
    assert ours.shape == theirs.shape, f"shape {list(ours.shape)} and {list(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"dtype {ours.dtype} and {theirs.dtype}"
    difference = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    allowed = 1e-5 if ours.dtype == torch.float32 else 2 * torch.finfo(ours.dtype).eps
    assert difference <= allowed, f"relative difference {difference:.2g}"


def _close_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        _close(mine, other)


PEERS = [
    Peer("eager", _in_layout(eager, NCHW)),
    Peer("eager channels-last", _in_layout(eager, NHWC)),
    Peer("torch.compile", peers.compiled(eager), peers.compile_problem, full=True),
]


def _cases(highlight: str | None = None) -> list[Case]:
    return [
        Case(
            f"128 x 100 x 168, {layout}, {name}",
            partial(_arguments, dtype, memory_format),
            highlight=highlight == f"{layout}, {name}",
        )
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        for layout, memory_format in (("NCHW", NCHW), ("channels-last", NHWC))
    ]


COMPARISON = Comparison(
    op="group_norm_relu_upsample",
    ours=group_norm_relu_upsample,
    peers=PEERS,
    cases=_cases(highlight="channels-last, float32"),
    agree=_close,
    cost=_cost,
)

TRAINING = Comparison(
    op="group_norm_relu_upsample, forward and backward",
    ours=forward_backward(group_norm_relu_upsample),
    peers=[
        Peer("eager", forward_backward(_in_layout(eager, NCHW))),
        Peer("eager channels-last", forward_backward(_in_layout(eager, NHWC))),
        Peer("torch.compile", forward_backward(peers.compiled(eager)), peers.compile_problem, full=True),
    ],
    cases=_cases(),
    agree=_close_gradients,
    cost=_training_cost,
)


def small_stage() -> tuple[Tensor, Tensor, Tensor]:
    """Makes a map whose channels have different means, as convolutions output, and GroupNorm's parameters."""
    x = random_normal(1, 64, 26, 42) + random_normal(1, 64, 1, 1, seed=1)
    return x, 1 + 0.1 * random_normal(64, seed=2), 0.1 * random_normal(64, seed=3)


ACCURACY = forward_and_gradient(
    "group_norm_relu_upsample",
    small_stage,
    lambda x, weight, bias: group_norm_relu_upsample(x, weight, bias, 32),
    lambda x, weight, bias: eager(x, weight, bias, 32),
)


@COMPARISON.rows()
def test_group_norm_relu_upsample(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@TRAINING.rows()
def test_group_norm_relu_upsample_training(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)

"""conv_gn_relu_upsample: the first stage of the semantic head on P3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops import conv_gn_relu_upsample

from . import peers
from .gradients import forward_backward
from .harness import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from .test_group_norm_relu_upsample import NCHW, NHWC, eager
from .test_semantic_head import no_fast_half


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
    """Lays the map and the convolution's weights out before the call, within its time where they lie otherwise."""

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
    """The gradient is asked for x alone: the convolution and its adjoint."""
    x, conv_weight = arguments[:2]
    large = 4 * nbytes(x) * conv_weight.shape[0] // x.shape[1]
    return Cost(bytes=2 * nbytes(arguments) + 2 * large + nbytes(gradients), flops=2 * _conv_flops(arguments))


def _close(ours: Tensor, theirs: Tensor) -> None:
    """Demands equal results up to the rounding of the convolution and, in half precision, of each step after it."""
    assert ours.shape == theirs.shape, f"shape {list(ours.shape)} and {list(theirs.shape)}"
    difference = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    allowed = 1e-3 if ours.dtype == torch.float32 else 4 * torch.finfo(ours.dtype).eps
    assert difference <= allowed, f"relative difference {difference:.2g}"


def _close_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        _close(mine, other)


def _cases() -> list[Case]:
    """New ones for each comparison: the table takes rows of one case for rows of one comparison."""
    # Where bfloat16 is emulated, the convolution is all that these rows would show.
    emulated = not torch.cuda.is_available() and no_fast_half(torch.device("cpu")) is not None
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
    agree=_close,
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


@COMPARISON.rows()
def test_conv_gn_relu_upsample(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@TRAINING.rows()
def test_conv_gn_relu_upsample_training(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)

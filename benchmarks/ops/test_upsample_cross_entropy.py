"""upsample_cross_entropy, the semantic head's loss, compared with `interpolate` and `cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops import upsample_cross_entropy

from ..harness import inputs, peers
from ..harness.accuracy import forward_and_gradient, random_normal
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from ..harness.gradients import close_gradients, forward_backward

# Per upsampled logit: a bilinear sample, then the subtraction of the maximum, the exponential and its sum.
_LOGIT_FLOPS = 7 + 3

NCHW, NHWC = torch.contiguous_format, torch.channels_last


def _arguments(layout: torch.memory_format, dtype: torch.dtype) -> Arguments:
    return inputs.semantic_logits(dtype=dtype, memory_format=layout), inputs.semantic_target(), 4


def _eager(logits: Tensor, target: Tensor, scale_factor: int) -> Tensor:
    """Interpolates in the dtype of the logits and computes the loss in float32, as under autocast."""
    upsampled = F.interpolate(logits, scale_factor=scale_factor, mode="bilinear", align_corners=False)
    return F.cross_entropy(upsampled.float(), target, ignore_index=255)


def _close(ours: Tensor, theirs: Tensor) -> None:
    """Requires equal losses up to rounding; roundings of half-precision logits average out."""
    assert abs(float(ours - theirs)) <= 1e-4 * abs(float(theirs)), f"{float(ours)} and {float(theirs)}"


def _close_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    if ours[0].dtype == torch.float32:
        close_gradients(ours, theirs)
    else:
        # The peer sums over 64 pixels in half precision and rounds each partial sum.
        worst, largest = float((ours[0] - theirs[0]).abs().max()), float(theirs[0].abs().max())
        allowed = 16 * torch.finfo(ours[0].dtype).eps * largest
        assert worst <= allowed, f"gradients differ by up to {worst:.2g}; the largest is {largest:.2g}"


def _cost(arguments: Arguments, output: Tensor) -> Cost:
    logits, _, scale_factor = arguments
    flops = _LOGIT_FLOPS * logits.numel() * scale_factor**2
    return Cost(bytes=nbytes(arguments) + nbytes(output), flops=flops)


def _training_cost(arguments: Arguments, gradient: Sequence[Tensor]) -> Cost:
    return Cost(
        bytes=2 * nbytes(arguments) + nbytes(gradient), flops=2 * _cost(arguments, arguments[0]).flops
    )


def _cases(highlight: bool = False) -> list[Case]:
    name = "54 x 200 x 336 to 800 x 1344"
    return [
        Case(f"{name}, NCHW", partial(_arguments, NCHW, torch.float32), highlight=highlight),
        Case(f"{name}, channels-last", partial(_arguments, NHWC, torch.float32)),
        Case(f"{name}, channels-last bf16", partial(_arguments, NHWC, torch.bfloat16), full=True),
    ]


COMPARISON = Comparison(
    op="upsample_cross_entropy",
    ours=upsample_cross_entropy,
    peers=[
        Peer("eager", _eager),
        Peer("torch.compile", peers.compiled(_eager), peers.compile_problem, full=True),
    ],
    cases=_cases(),
    agree=_close,
    cost=_cost,
)

TRAINING = Comparison(
    op="upsample_cross_entropy, forward and backward",
    ours=forward_backward(upsample_cross_entropy),
    peers=[
        Peer("eager", forward_backward(_eager)),
        Peer("torch.compile", forward_backward(peers.compiled(_eager)), peers.compile_problem, full=True),
    ],
    cases=_cases(highlight=True),
    agree=_close_gradients,
    cost=_training_cost,
)


def small_logits() -> Tensor:
    """Makes smooth float64 logits of 54 classes, [1, 54, 50, 84]."""
    return 3 * F.interpolate(random_normal(1, 54, 25, 42), scale_factor=2.0, mode="bilinear")


def _small_logits_and_target() -> tuple[Tensor, Tensor]:
    target = torch.randint(0, 54, (1, 200, 336), generator=torch.Generator().manual_seed(7))
    target[:, :20] = 255
    return small_logits(), target


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    upsampled = F.interpolate(logits, scale_factor=4.0, mode="bilinear")
    return F.cross_entropy(upsampled, target, ignore_index=255)


ACCURACY = forward_and_gradient(
    "upsample_cross_entropy",
    _small_logits_and_target,
    lambda logits, target: upsample_cross_entropy(logits, target, 4),
    _cross_entropy,
)


@COMPARISON.rows()
def test_upsample_cross_entropy(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@TRAINING.rows()
def test_upsample_cross_entropy_training(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)

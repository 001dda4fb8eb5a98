"""upsample_cross_entropy: the semantic head's loss at the image's resolution, against interpolate and cross_entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops import upsample_cross_entropy

from . import inputs, peers
from .gradients import close_gradients, forward_backward
from .harness import Arguments, Case, Comparison, Cost, Peer, Row, nbytes

# For each upsampled logit: a bilinear sample, the largest subtracted, the exponential, its sum.
_LOGIT_FLOPS = 7 + 3

NCHW, NHWC = torch.contiguous_format, torch.channels_last


def _arguments(layout: torch.memory_format, dtype: torch.dtype) -> Arguments:
    return inputs.semantic_logits(dtype=dtype, memory_format=layout), inputs.semantic_target(), 4


def _eager(logits: Tensor, target: Tensor, scale_factor: int) -> Tensor:
    """As autocast does it: the interpolation in the dtype of the logits, the loss in float32."""
    upsampled = F.interpolate(logits, scale_factor=scale_factor, mode="bilinear", align_corners=False)
    return F.cross_entropy(upsampled.float(), target, ignore_index=255)


def _close(ours: Tensor, theirs: Tensor) -> None:
    """Demands equal losses; half-precision upsampled logits are rounded, each in its own direction."""
    assert abs(float(ours - theirs)) <= 1e-4 * abs(float(theirs)), f"{float(ours)} and {float(theirs)}"


def _close_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    if ours[0].dtype == torch.float32:
        close_gradients(ours, theirs)
    else:
        # The peer's sums over 64 pixels, each rounded, are half-precision numbers themselves.
        worst, largest = float((ours[0] - theirs[0]).abs().max()), float(theirs[0].abs().max())
        allowed = 16 * torch.finfo(ours[0].dtype).eps * largest
        assert worst <= allowed, f"gradients differ by up to {worst:.2g} where the largest is {largest:.2g}"


def _cost(arguments: Arguments, output: Tensor) -> Cost:
    logits, _, scale_factor = arguments
    flops = _LOGIT_FLOPS * logits.numel() * scale_factor**2
    return Cost(bytes=nbytes(arguments) + nbytes(output), flops=flops)


def _training_cost(arguments: Arguments, gradient: Sequence[Tensor]) -> Cost:
    return Cost(
        bytes=2 * nbytes(arguments) + nbytes(gradient), flops=2 * _cost(arguments, arguments[0]).flops
    )


CASES = [
    Case("54 x 200 x 336 to 800 x 1344, NCHW", partial(_arguments, NCHW, torch.float32)),
    Case("54 x 200 x 336 to 800 x 1344, channels-last", partial(_arguments, NHWC, torch.float32)),
    Case(
        "54 x 200 x 336 to 800 x 1344, channels-last bf16",
        partial(_arguments, NHWC, torch.bfloat16),
        full=True,
    ),
]

COMPARISON = Comparison(
    op="upsample_cross_entropy",
    ours=upsample_cross_entropy,
    peers=[
        Peer("eager", _eager),
        Peer("torch.compile", peers.compiled(_eager), peers.compile_problem, full=True),
    ],
    cases=CASES,
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
    cases=CASES,
    agree=_close_gradients,
    cost=_training_cost,
)


@COMPARISON.rows()
def test_upsample_cross_entropy(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@TRAINING.rows()
def test_upsample_cross_entropy_training(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)

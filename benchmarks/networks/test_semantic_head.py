"""The whole semantic head at 800 x 1344: forward pass, and a training step with the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.models import PanopticFPNConfig
from panfpn_fast.models.semantic_head import SemanticHead

from ..harness import inputs
from ..harness.agreement import close_norm
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from ..harness.measuring import bfloat16_problem
from .eager_head import eager_head, eager_loss

_STRIDES = (4, 8, 16, 32)


def _close(ours: Tensor | Sequence[Tensor], theirs: Tensor | Sequence[Tensor]) -> None:
    first = ours if isinstance(ours, Tensor) else ours[0]
    close_norm(1e-3 if first.dtype == torch.float32 else 0.1)(ours, theirs)


@cache
def _head(dtype: torch.dtype, device: torch.device) -> SemanticHead:
    torch.manual_seed(0)
    head = SemanticHead(PanopticFPNConfig()).to(device, dtype)
    return head.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _arguments(dtype: torch.dtype) -> Arguments:
    generator = torch.Generator().manual_seed(0)
    height, width = inputs.PADDED
    return tuple(
        torch.randn(1, 256, height // stride, width // stride, generator=generator)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for stride in _STRIDES
    )


def _training_arguments(dtype: torch.dtype) -> Arguments:
    return *_arguments(dtype), inputs.semantic_target()


def _of(features: Sequence[Tensor]) -> SemanticHead:
    return _head(features[0].dtype, features[0].device)


@torch.no_grad()
def _ours(*features: Tensor) -> Tensor:
    return _of(features)(features)


@torch.no_grad()
def _eager(*features: Tensor) -> Tensor:
    return eager_head(_of(features), list(features))


@torch.no_grad()
def _eager_nchw(*features: Tensor) -> Tensor:
    return eager_head(_of(features), [feature.contiguous() for feature in features])


def _gradients(
    loss: Callable[[SemanticHead, list[Tensor], Tensor], Tensor],
) -> Callable[..., tuple[Tensor, ...]]:
    """Returns a function that computes the gradients of a loss for the features and all parameters."""

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        *features, target = arguments
        head = _of(features)
        leaves = [feature.detach().requires_grad_() for feature in features]
        return torch.autograd.grad(loss(head, leaves, target), [*leaves, *head.parameters()])

    return call


def _our_loss(head: SemanticHead, features: list[Tensor], target: Tensor) -> Tensor:
    return ops.upsample_cross_entropy(head(features), target, head.stride, ignore_index=255)


def _flops(features: Sequence[Tensor]) -> int:
    head = _of(features)
    total = 0
    for stages, feature in zip(head.levels.values(), features, strict=True):
        pixels = feature.shape[0] * feature.shape[2] * feature.shape[3]
        for i, stage in enumerate(stages):  # type: ignore[arg-type, var-annotated]
            total += 2 * stage.conv.weight.numel() * pixels * 4**i
    return total


def _cost(arguments: Arguments, output: Tensor) -> Cost:
    return Cost(bytes=nbytes(arguments) + nbytes(output), flops=_flops(arguments))


def _training_cost(arguments: Arguments, output: Sequence[Tensor]) -> Cost:
    return Cost(bytes=2 * nbytes(arguments) + nbytes(output), flops=3 * _flops(arguments[:-1]))


def _peers(eager: Callable[..., object], nchw: Callable[..., object] | None) -> list[Peer]:
    found = [Peer("eager", eager)]
    if nchw is not None:
        found.append(Peer("eager, NCHW", nchw))
    compiled = torch.compile(eager, mode="max-autotune")
    return [*found, Peer("torch.compile", compiled, full=True)]


def _cases(arguments: Callable[[torch.dtype], Arguments]) -> list[Case]:
    return [
        Case("800 x 1344, float32", partial(arguments, torch.float32), highlight=True),
        Case("800 x 1344, bfloat16", partial(arguments, torch.bfloat16), problem=bfloat16_problem),
    ]


FORWARD = Comparison(
    op="semantic head",
    ours=_ours,
    peers=_peers(_eager, _eager_nchw),
    cases=_cases(_arguments),
    agree=_close,
    cost=_cost,
)

TRAINING = Comparison(
    op="semantic head, forward, loss and backward",
    ours=_gradients(_our_loss),
    peers=_peers(_gradients(eager_loss), None),
    cases=_cases(_training_arguments),
    agree=_close,
    cost=_training_cost,
)


@FORWARD.rows()
def test_semantic_head(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@TRAINING.rows()
def test_semantic_head_training(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)

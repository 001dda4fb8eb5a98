"""The whole semantic head at 800 x 1344: forward, and a training step with the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from panfpn_fast.models import PanopticFPNConfig
from panfpn_fast.models.semantic_head import SemanticHead

from . import inputs
from .harness import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from .semantic_eager import eager_head, eager_loss

_STRIDES = (4, 8, 16, 32)


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
    """Gradients of the features and of all parameters."""

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        *features, target = arguments
        head = _of(features)
        leaves = [feature.detach().requires_grad_() for feature in features]
        return torch.autograd.grad(loss(head, leaves, target), [*leaves, *head.parameters()])

    return call


def _our_loss(head: SemanticHead, features: list[Tensor], target: Tensor) -> Tensor:
    return head.loss(head(features), target)


def _close(ours: Tensor | Sequence[Tensor], theirs: Tensor | Sequence[Tensor]) -> None:
    """Demands the same up to rounding, in the mean: where an activation is nearly 0, a rounding decides its ReLU."""
    pairs = [(ours, theirs)] if isinstance(ours, Tensor) else list(zip(ours, theirs, strict=True))
    for mine, other in pairs:
        assert isinstance(mine, Tensor)
        assert isinstance(other, Tensor)
        allowed = 1e-3 if mine.dtype == torch.float32 else 0.1
        difference = float((mine - other).norm() / other.norm())
        assert difference <= allowed, f"relative difference {difference:.2g}"


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


def no_fast_half(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return None
    return "this CPU has no bfloat16 arithmetic (AVX512_BF16 or AMX)"


def _peers(eager: Callable[..., object], nchw: Callable[..., object] | None) -> list[Peer]:
    found = [Peer("eager", eager)]
    if nchw is not None:
        found.append(Peer("eager, NCHW", nchw))
    compiled = torch.compile(eager, mode="max-autotune")
    return [*found, Peer("torch.compile", compiled, full=True)]


def _cases(arguments: Callable[[torch.dtype], Arguments]) -> list[Case]:
    cases = [Case("800 x 1344, float32", partial(arguments, torch.float32))]
    if no_fast_half(torch.device("cpu")) is None:
        cases.append(Case("800 x 1344, bfloat16", partial(arguments, torch.bfloat16)))
    return cases


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

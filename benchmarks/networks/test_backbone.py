"""The paper's figure 5: the cost of an FPN and of other backbones with high-resolution features.

The backbones compute different features at different resolutions, so results cannot be compared. The check only
requires that features have the right shape and are finite.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.activations import convolution_outputs, saved_bytes
from ..harness.comparison import OURS, Arguments, Case, Comparison, Cost, Peer, Row, nbytes, to_device
from ..harness.flops import count_flops
from ..harness.measuring import memory_problem
from ..harness.timing import note_flops
from .backbones import DilatedBackbone, FPNBackbone, SymmetricBackbone

_SMALL, _PAPER = (480, 640), (1024, 2048)

_KINDS: dict[str, tuple[Callable[[str], nn.Module], int]] = {
    OURS: (FPNBackbone, 4),
    "symmetric decoder": (SymmetricBackbone, 4),
    "dilated, stride 16": (partial(DilatedBackbone, output_stride=16), 16),
    "dilated, stride 8": (partial(DilatedBackbone, output_stride=8), 8),
}
"""The constructor of each backbone and the stride of its features."""


@cache
def _backbone(contender: str, name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    backbone = _KINDS[contender][0](name)
    # Each residual block adds little, so that the magnitude of the activations does not grow.
    for key, buffer in backbone.named_buffers():
        if key.endswith("norm3.weight"):
            buffer.fill_(0.2)
    return backbone.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _run(contender: str) -> Callable[[str, Tensor], Tensor]:
    @torch.no_grad()
    def call(name: str, images: Tensor) -> Tensor:
        return _backbone(contender, name, images.device)(images)

    return call


def _arguments(name: str, size: tuple[int, int]) -> Arguments:
    random = torch.Generator().manual_seed(0)
    return name, torch.randn(1, 3, *size, generator=random)


def _plausible(stride: int) -> Callable[[Tensor, Tensor], None]:
    """Requires finite features of a stride, given ours with a stride of 4."""

    def check(ours: Tensor, theirs: Tensor) -> None:
        expected = [side * 4 // stride for side in ours.shape[2:]]
        assert list(theirs.shape[2:]) == expected, (
            f"features are {list(theirs.shape[2:])}, expected {expected}"
        )
        assert bool(ours.isfinite().all()), "the FPN's features are not finite"
        assert bool(theirs.isfinite().all()), "the peer's features are not finite"

    return check


def _cost(arguments: Arguments, output: Tensor) -> Cost:
    """Leaves flops at 0; the test counts the operations of each contender."""
    return Cost(bytes=nbytes(arguments) + nbytes(output), flops=0)


COMPARISON = Comparison(
    op="backbone: FPN",
    ours=_run(OURS),
    peers=[
        Peer(name, _run(name), agree=_plausible(stride))
        for name, (_, stride) in _KINDS.items()
        if name != OURS
    ],
    cases=[
        Case("R-50, 480 x 640", partial(_arguments, "resnet50", _SMALL)),
        Case("R-101, 480 x 640", partial(_arguments, "resnet101", _SMALL), full=True),
        *(
            Case(
                f"{label}, 1024 x 2048",
                partial(_arguments, name, _PAPER),
                full=True,
                # The tensors that a dilated backbone keeps for its backward pass.
                problem=partial(memory_problem, 40),
            )
            for label, name in (("R-50", "resnet50"), ("R-101", "resnet101"))
        ),
    ],
    agree=_plausible(4),
    cost=_cost,
)


@COMPARISON.rows()
def test_backbone(row: Row, time_row: Callable[[Row], None], benchmark: Any) -> None:
    time_row(row)
    name, images = to_device(row.case.arguments(), row.device)
    backbone = _backbone(row.contender, name, row.device)
    note_flops(benchmark, count_flops(lambda: row.call(name, images)))
    benchmark.extra_info.update(
        stride=_KINDS[row.contender][1],
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        activations=convolution_outputs(backbone, lambda: row.call(name, images)),
        saved_for_backward_bytes=saved_bytes([backbone], lambda: backbone(images)),
    )

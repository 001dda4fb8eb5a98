"""One network for things and stuff compared with two: the paper's claim that sharing the backbone halves the cost.

The two networks have the weights of the shared network, so the predictions are equal. The shared R-101 and `two R-50`
are the paper's pair of about equal cost; their predictions are unrelated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from panfpn_fast.data.sample import Target
from panfpn_fast.models import PanopticFPN, TwoNetworks
from panfpn_fast.models.config import TASKS
from panfpn_fast.models.conv_fusion import for_prediction
from panfpn_fast.training.network import TrainingNetwork, total

from ..harness import inputs
from ..harness.activations import saved_bytes
from ..harness.comparison import OURS, Arguments, Case, Comparison, Cost, Peer, Row, nbytes, to_device
from ..harness.flops import both_ways
from ..harness.timing import note_flops
from .stand_in import stand_in
from .training_inputs import annotation

_SMALL, _USUAL = (480, 640), inputs.IMAGE

Networks = Callable[[str, torch.device], Sequence[PanopticFPN]]


def _shared(backbone: str, device: torch.device) -> list[PanopticFPN]:
    return [stand_in(backbone, device)]


@cache
def _two(backbone: str, device: torch.device) -> TwoNetworks:
    shared = stand_in(backbone, device)
    parts = []
    for task in TASKS:
        part = PanopticFPN.from_config(shared.config.replace(tasks=(task,))).eval().to(device)
        missing, _ = part.load_state_dict(shared.state_dict(), strict=False)
        assert not missing
        parts.append(part.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    return TwoNetworks(*parts)


def _parts(backbone: str, device: torch.device) -> list[PanopticFPN]:
    two = _two(backbone, device)
    return [two.instance, two.semantic]


def _parts_r50(backbone: str, device: torch.device) -> list[PanopticFPN]:
    return _parts("resnet50", device)


_NETWORKS: dict[str, Networks] = {OURS: _shared, "two networks": _parts, "two R-50": _parts_r50}


@cache
def _predicting(contender: str, backbone: str, device: torch.device) -> PanopticFPN | TwoNetworks:
    """Returns the network that a `Predictor` runs."""
    if contender == OURS:
        return for_prediction(stand_in(backbone, device))
    return for_prediction(_two("resnet50" if contender == "two R-50" else backbone, device))


def _predict(contender: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def call(backbone: str, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        [output] = _predicting(contender, backbone, image.device)([image])
        return output.panoptic, output.boxes, output.scores

    return call


def _step(contender: str) -> Callable[..., tuple[Tensor, ...]]:
    """Returns a function that computes the losses and the gradients of all weights, and returns the losses."""

    def call(backbone: str, image: Tensor, target: Target) -> tuple[Tensor, ...]:
        losses: dict[str, Tensor] = {}
        for network in _NETWORKS[contender](backbone, image.device):
            found = TrainingNetwork(network)([image], [target], [0])
            torch.autograd.grad(total(found), list(network.parameters()))
            losses |= {name: loss.detach() for name, loss in found.items()}
        return tuple(losses[name] for name in sorted(losses))

    return call


def _images(backbone: str, size: tuple[int, int]) -> Arguments:
    return backbone, inputs.image(size)


def _training_arguments(backbone: str, size: tuple[int, int]) -> Arguments:
    return *_images(backbone, size), annotation(size)


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def _close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def _incomparable(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert ours[0].shape == theirs[0].shape


def _cost(arguments: Arguments, output: Any) -> Cost:
    """Leaves flops at 0; they depend on the detections, so `_note` counts them."""
    return Cost(bytes=nbytes(arguments) + nbytes(output), flops=0)


def _cases(arguments: Callable[[str, tuple[int, int]], Arguments]) -> list[Case]:
    return [
        Case(
            f"{label}, {size[0]} x {size[1]}",
            partial(arguments, backbone, size),
            full,
            highlight=size == _USUAL,
        )
        for label, backbone, size, full in (
            ("R-50", "resnet50", _USUAL, False),
            ("R-50", "resnet50", _SMALL, True),
            ("R-101", "resnet101", _USUAL, True),
            ("R-101", "resnet101", _SMALL, True),
        )
    ]


INFERENCE = Comparison(
    op="shared network",
    ours=_predict(OURS),
    peers=[
        Peer("two networks", _predict("two networks")),
        Peer("two R-50", _predict("two R-50"), agree=_incomparable, full=True),
    ],
    cases=_cases(_images),
    agree=_same,
    cost=_cost,
)

TRAINING = Comparison(
    op="shared network, training step",
    ours=_step(OURS),
    peers=[
        Peer("two networks", _step("two networks")),
        Peer("two R-50", _step("two R-50"), agree=_incomparable, full=True),
    ],
    cases=_cases(_training_arguments),
    agree=_close,
    cost=_cost,
)


def _note(row: Row, benchmark: Any, *, training: bool) -> None:
    """Records the cost of the row's networks, and checks that torch's count of operations equals the formulas."""
    arguments = to_device(row.case.arguments(), row.device)
    image = arguments[1]
    networks = _NETWORKS[row.contender](arguments[0], row.device)
    counted, formula = both_ways(networks, lambda: row.call(*arguments), [image], training=training)
    assert counted == sum(formula.values()), f"torch counts {counted} operations, the formulas {formula}"
    note_flops(benchmark, counted)
    info = benchmark.extra_info
    info.update(
        networks=len(networks),
        flops_by_formula=formula,
        backbone_and_fpn_share_of_flops=(formula["backbone"] + formula["fpn"]) / counted,
        parameters=[_parameters(network) for network in networks],
        backbone_and_fpn_parameters=[_parameters(network.backbone, network.fpn) for network in networks],
    )
    if training:
        # One number per network: training one after the other needs the larger, training both at once the sum.
        info["saved_for_backward_bytes"] = [
            saved_bytes([network], lambda network=network: _losses(network, arguments))  # type: ignore[misc]
            for network in networks
        ]
    if benchmark.enabled:
        info["images_per_s"] = 1 / float(benchmark.stats.stats.median)


def _parameters(*modules: torch.nn.Module) -> int:
    """Counts the learnt numbers; frozen batch norms have none."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _losses(network: PanopticFPN, arguments: Arguments) -> Tensor:
    _, image, target = arguments
    return total(TrainingNetwork(network)([image], [target], [0]))


@INFERENCE.rows()
def test_shared_vs_separate(row: Row, time_row: Callable[[Row], None], benchmark: Any) -> None:
    time_row(row)
    _note(row, benchmark, training=False)


@TRAINING.rows()
def test_shared_vs_separate_training(row: Row, time_row: Callable[[Row], None], benchmark: Any) -> None:
    time_row(row)
    _note(row, benchmark, training=True)

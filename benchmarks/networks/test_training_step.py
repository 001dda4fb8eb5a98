"""A training step: the losses of an image and the gradients of all weights, without the optimizer, which is torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from panfpn_fast.data.sample import Target
from panfpn_fast.training.network import TrainingNetwork, total

from ..harness import inputs, peers
from ..harness.activations import saved_bytes
from ..harness.comparison import OURS, Arguments, Case, Comparison, Cost, Peer, Row, nbytes, to_device
from ..harness.flops import count_flops
from .eager_network import EagerPanopticFPN
from .eager_training import EagerTrainingNetwork
from .stand_in import stand_in
from .training_inputs import annotation

_BACKBONE = "resnet50"

# Contiguous, the default layout of modules, which detectron2 uses.
_LAYOUTS = {
    OURS: torch.channels_last,
    "eager": torch.contiguous_format,
    "eager, channels-last": torch.channels_last,
}


@cache
def _network(contender: str, device: torch.device) -> TrainingNetwork:
    layout = _LAYOUTS[contender]
    if contender == OURS:
        return TrainingNetwork(stand_in(_BACKBONE, device, memory_format=layout))
    return EagerTrainingNetwork(stand_in(_BACKBONE, device, kind=EagerPanopticFPN, memory_format=layout))


def _step(contender: str) -> Callable[[Tensor, Target], tuple[Tensor, ...]]:
    """Returns a function that returns the losses and the norms of the gradients of the network's parts."""

    def call(image: Tensor, target: Target) -> tuple[Tensor, ...]:
        network = _network(contender, image.device)
        losses = network([image], [target], [0])
        parts = [list(part.parameters()) for part in network.model.children()]
        gradients = torch.autograd.grad(total(losses), [weight for part in parts for weight in part])
        by_part = torch.split(torch.stack([gradient.norm() for gradient in gradients]), list(map(len, parts)))
        norms = [of_part.norm() for of_part in by_part if len(of_part)]
        return *(losses[name].detach() for name in sorted(losses)), *norms

    return call


def _close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    # A score in another order of summation may select another box out of a thousand.
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-5)


def _arguments(size: tuple[int, int]) -> Arguments:
    return inputs.image(size), annotation(size)


def _cost(arguments: Arguments, output: Sequence[Tensor]) -> Cost:
    image = arguments[0]
    weights = nbytes(list(_network(OURS, image.device).parameters()))
    return Cost(bytes=nbytes(arguments) + 2 * weights, flops=count_flops(lambda: _step(OURS)(*arguments)))


COMPARISON = Comparison(
    op="training step",
    ours=_step(OURS),
    peers=[
        Peer("eager", _step("eager"), peers.torchvision_problem),
        Peer("eager, channels-last", _step("eager, channels-last"), peers.torchvision_problem, full=True),
    ],
    cases=[
        Case("R-50, 480 x 640, float32", partial(_arguments, (480, 640)), highlight=True),
        Case("R-50, 800 x 1333, float32", partial(_arguments, inputs.IMAGE), full=True),
    ],
    agree=_close,
    cost=_cost,
)


@COMPARISON.rows()
def test_training_step(row: Row, time_row: Callable[[Row], None], benchmark: Any) -> None:
    time_row(row)
    image, target = to_device(row.case.arguments(), row.device)
    network = _network(row.contender, row.device)
    benchmark.extra_info.update(
        parameters=sum(weight.numel() for weight in network.parameters()),
        saved_for_backward_bytes=saved_bytes([network], lambda: total(network([image], [target], [0]))),
    )

"""A training step: the losses of an image and the gradients of all weights, without the optimizer, which is torch's.

The parts of a whole step, with the loading of an image and the optimizer, are timed too, except for an installed
detectron2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from panfpn_fast.data.loader import Batch
from panfpn_fast.data.sample import Target
from panfpn_fast.training import losses
from panfpn_fast.training import network as training_network
from panfpn_fast.training.network import TrainingNetwork, total

from ..harness import inputs, peers
from ..harness.activations import saved_bytes
from ..harness.comparison import OURS, Arguments, Case, Comparison, Cost, Peer, Row, nbytes, to_device
from ..harness.flops import count_flops
from ..harness.stages import Part, stage_seconds
from . import detectron2_network, loading
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


def _module(contender: str, device: torch.device) -> nn.Module:
    """Returns the module that computes a contender's losses."""
    if contender == detectron2_network.NAME:
        return detectron2_network.network(_BACKBONE, device, training=True)
    return _network(contender, device)


def _losses(contender: str, image: Tensor, target: Target) -> dict[str, Tensor]:
    if contender == detectron2_network.NAME:
        return detectron2_network.losses(_BACKBONE, image, target)
    return _network(contender, image.device)([image], [target], [0])


def _weights(contender: str, device: torch.device) -> list[list[Tensor]]:
    """Returns the weights of each part of the network."""
    if contender == detectron2_network.NAME:
        return detectron2_network.weights(_BACKBONE, device)
    return [list(part.parameters()) for part in _network(contender, device).model.children()]


def _step(contender: str) -> Callable[[Tensor, Target], tuple[Tensor, ...]]:
    """Returns a function that returns the losses and the norms of the gradients of the network's parts."""

    def call(image: Tensor, target: Target) -> tuple[Tensor, ...]:
        losses = _losses(contender, image, target)
        parts = _weights(contender, image.device)
        gradients = torch.autograd.grad(total(losses), [weight for part in parts for weight in part])
        by_part = torch.split(torch.stack([gradient.norm() for gradient in gradients]), list(map(len, parts)))
        norms = [of_part.norm() for of_part in by_part if len(of_part)]
        return *(losses[name].detach() for name in sorted(losses)), *norms

    return call


def _close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    # A score in another order of summation may select another box out of a thousand.
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-5)


def _similar(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Compares with detectron2, which samples other anchors and boxes of the background.

    Both sample all objects, so the losses of boxes, masks and stuff agree, and the gradients of the mask head and the
    semantic head. The losses of the two classifications and the other gradients depend on the samples.
    """
    for number, pair in enumerate(zip(ours, theirs, strict=True)):
        sampled = number in (1, 4, 6, 7, 8, 9)  # loss_cls, loss_rpn_cls, backbone, fpn, rpn and box_head
        torch.testing.assert_close(*pair, rtol=0.5 if sampled else 1e-2, atol=1e-5)


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
        Peer(
            detectron2_network.NAME,
            _step(detectron2_network.NAME),
            detectron2_network.problem,
            agree=_similar,
        ),
    ],
    cases=[
        Case("R-50, 480 x 640, float32", partial(_arguments, (480, 640)), highlight=True),
        Case("R-50, 800 x 1333, float32", partial(_arguments, inputs.IMAGE), full=True),
    ],
    agree=_close,
    cost=_cost,
)


def load(batches: Iterator[Batch]) -> None:
    next(batches)


def upload(image: Tensor, target: Target, device: torch.device) -> tuple[Tensor, Target]:
    return image.to(device, non_blocking=True), target.to(device, non_blocking=True)


def backward(loss: Tensor) -> None:
    loss.backward()


def update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _parts(network: TrainingNetwork) -> list[Part]:
    """Returns the functions of a step in the order of the table; the order of their calls is another one."""
    model, here = network.model, sys.modules[__name__]
    loads = [] if loading.sample_problem(torch.device("cpu")) else [Part(here, "load", "load")]
    return [
        *loads,
        Part(here, "upload", "upload"),
        Part(model, "prepare", "forward"),
        Part(model, "features", "forward"),
        *(Part(head, "forward", "forward") for head in (model.rpn, model.box_head, model.mask_head)),
        Part(model.semantic_head, "forward", "forward"),
        Part(model.rpn, "anchors", "targets"),
        *(
            Part(training_network, name, "targets")
            for name in ("propose", "sample_anchors", "sample_boxes", "mask_targets", "semantic_labels")
        ),
        *(Part(losses, name, "loss") for name in ("rpn_losses", "box_losses", "mask_loss", "semantic_loss")),
        Part(here, "backward", "backward"),
        Part(here, "update", "optimizer"),
    ]


def step_seconds(contender: str, arguments: Arguments, device: torch.device) -> dict[str, float]:
    """Times the parts of a whole step: seconds of each, and under "rest" the time outside.

    Args:
        contender: Name of the row.
        arguments: The image and the annotation of the case, on the CPU.
        device: Device of the network.

    Returns:
        "load" is one of the photographs of `loading`, resized to the size of the case in this process; it is absent
        without them. "targets" are proposals, sampled anchors and boxes, and their targets. The optimizer is fused SGD
        with momentum, with a learning rate of 0, so that the weights stay.
    """
    image, target = arguments
    network = _network(contender, device)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=0.9, fused=True)
    parts = _parts(network)
    with_photograph = parts[0].stage == "load"
    dataset = loading.open_photographs() if with_photograph else loading.open_scenes(1)
    loader = loading.train_loader(dataset, min(image.shape[1:]), 1, workers=0)

    def step() -> None:
        here = sys.modules[__name__]  # its functions are replaced by timed ones
        if with_photograph:
            here.load(batches)
        there = here.upload(image, target, device)
        found = network([there[0]], [there[1]], [0])
        here.backward(total(found))
        here.update(optimizer)

    with closing(loader):
        batches = iter(loader)
        step()
        return stage_seconds(step, parts, device)


@COMPARISON.rows()
def test_training_step(row: Row, time_row: Callable[[Row], None], benchmark: Any) -> None:
    time_row(row)
    image, target = to_device(row.case.arguments(), row.device)
    module = _module(row.contender, row.device)
    benchmark.extra_info.update(
        parameters=sum(weight.numel() for weight in module.parameters()),
        saved_for_backward_bytes=saved_bytes([module], lambda: total(_losses(row.contender, image, target))),
    )
    if row.contender == detectron2_network.NAME:
        return
    seconds = step_seconds(row.contender, row.case.arguments(), row.device)
    benchmark.extra_info["step_ms"] = {part: 1e3 * each for part, each in seconds.items()}

"""One network for things and stuff against two: the paper's claim that sharing the backbone halves the cost.

The two have the shared network's weights, so both predict the same. `two R-50` beside the shared R-101 is the paper's
pair of about equal cost, whose predictions have nothing in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from panfpn_fast.data.sample import Target
from panfpn_fast.models import PanopticFPN, TwoNetworks
from panfpn_fast.training.network import TrainingNetwork, total

from . import inputs
from .harness import Arguments, Case, Comparison, Cost, Peer, Row, nbytes

_SMALL, _USUAL = (480, 640), inputs.IMAGE
_OBJECTS = 12


def _standing_in(network: PanopticFPN) -> None:
    """Makes random weights behave: each residual block adds a little, so that activations keep their size."""
    for name, buffer in network.backbone.named_buffers():
        if name.endswith("norm3.weight"):
            buffer.fill_(0.2)


@cache
def _shared(backbone: str, device: torch.device) -> PanopticFPN:
    torch.manual_seed(0)
    # All of the 100 best candidates are detections, however badly they score.
    network = PanopticFPN(backbone=backbone, score_threshold=0.0, instance_score_threshold=0.0)
    _standing_in(network)
    return network.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@cache
def _two(backbone: str, device: torch.device) -> TwoNetworks:
    shared = _shared(backbone, device)
    parts = []
    for task in ("instance", "semantic"):
        part = PanopticFPN(**vars(shared.config.replace(tasks=(task,)))).eval().to(device)
        missing, _ = part.load_state_dict(shared.state_dict(), strict=False)
        assert not missing
        parts.append(part.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    return TwoNetworks(*parts)


def _predict(
    networks: Callable[[str, torch.device], nn.Module],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def call(backbone: str, *images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        [output] = networks(backbone, images[0].device)(images)
        return output.panoptic, output.boxes, output.scores

    return call


def _images(backbone: str, size: tuple[int, int]) -> Arguments:
    random = torch.Generator().manual_seed(0)
    return backbone, torch.randint(0, 256, (3, *size), generator=random, dtype=torch.uint8)


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def _incomparable(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert ours[0].shape == theirs[0].shape


def _target(size: tuple[int, int]) -> Target:
    boxes = inputs.boxes(_OBJECTS, size).round()
    boxes = torch.cat((boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2] + 8)), dim=1)
    instances = torch.zeros(size, dtype=torch.int32)
    for number, (x1, y1, x2, y2) in enumerate(boxes.int().tolist(), 1):
        instances[y1:y2, x1:x2] = number
    semantic = inputs.semantic_labels(size).to(torch.uint8)
    semantic[instances > 0] = 0
    return Target(boxes, inputs.groups(_OBJECTS), instances, semantic)


def _training_arguments(backbone: str, size: tuple[int, int]) -> Arguments:
    return *_images(backbone, size), _target(size)


def _alone(backbone: str, device: torch.device) -> list[PanopticFPN]:
    return [_shared(backbone, device)]


def _parts(backbone: str, device: torch.device) -> list[PanopticFPN]:
    two = _two(backbone, device)
    return [two.instance, two.semantic]


def _step(parts: Callable[[str, torch.device], Sequence[PanopticFPN]]) -> Callable[..., tuple[Tensor, ...]]:
    """Losses, and the gradients of all weights, which are dropped."""

    def call(backbone: str, image: Tensor, target: Target) -> tuple[Tensor, ...]:
        losses: dict[str, Tensor] = {}
        for network in parts(backbone, image.device):
            found = TrainingNetwork(network)([image], [target], [0])
            torch.autograd.grad(total(found), [p for p in network.parameters() if p.requires_grad])
            losses |= {name: loss.detach() for name, loss in found.items()}
        return tuple(losses[name] for name in sorted(losses))

    return call


def _close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def conv_flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Of a 3x3 or 1x1 convolution on maps of its output's size."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


_OUR_CONVOLUTIONS = {
    torch.ops.panfpn_fast.conv3x3: conv_flops,
    torch.ops.panfpn_fast.group_norm_relu_project: lambda x, mean, rstd, gn_weight, gn_bias, weight, *_, **__: (
        2 * math.prod(weight) * x[0] * math.prod(x[2:])
    ),
}


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions and matrix products, by torch's counter."""
    with FlopCounterMode(display=False, custom_mapping=_OUR_CONVOLUTIONS) as counter:
        call()
    return counter.get_total_flops()


def _cost(networks: Callable[..., Any]) -> Callable[[Arguments, Any], Cost]:
    def cost(arguments: Arguments, output: Any) -> Cost:
        return Cost(bytes=nbytes(arguments) + nbytes(output), flops=count_flops(lambda: networks(*arguments)))

    return cost


def _cases(arguments: Callable[[str, tuple[int, int]], Arguments]) -> list[Case]:
    return [
        Case(
            f"{label}, {size[0]} x {size[1]}",
            partial(arguments, backbone, size),
            full=full,
        )
        for label, backbone, size, full in (
            ("R-50", "resnet50", _SMALL, False),
            ("R-50", "resnet50", _USUAL, True),
            ("R-101", "resnet101", _SMALL, True),
            ("R-101", "resnet101", _USUAL, True),
        )
    ]


def _two_r50(backbone: str, device: torch.device) -> TwoNetworks:
    return _two("resnet50", device)


INFERENCE = Comparison(
    op="shared network",
    ours=_predict(_shared),
    peers=[
        Peer("two networks", _predict(_two)),
        Peer("two R-50", _predict(_two_r50), agree=_incomparable, full=True),
    ],
    cases=_cases(_images),
    agree=_same,
    cost=_cost(_predict(_shared)),
)

TRAINING = Comparison(
    op="shared network, training step",
    ours=_step(_alone),
    peers=[
        Peer("two networks", _step(_parts)),
    ],
    cases=_cases(_training_arguments),
    agree=_close,
    cost=_cost(_step(_alone)),
)


@INFERENCE.rows()
def test_shared_vs_separate(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@TRAINING.rows()
def test_shared_vs_separate_training(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)

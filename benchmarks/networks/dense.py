"""The dense part of a network, which has static shapes: backbone, FPN, the RPN's convolutions and the semantic head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from panfpn_fast.models import PanopticFPN

_LEVELS = 5


class DenseOutput(NamedTuple):
    """The results of the dense part."""

    pyramid: list[Tensor]  # P2 to P6
    objectness: list[Tensor]
    deltas: list[Tensor]
    semantic: Tensor  # logits at 1/4


class Dense(nn.Module):
    """Runs the dense part of a network on prepared images [N, 3, H, W]; returns the tensors of a `DenseOutput`.

    Args:
        network: A network for things and stuff.
    """

    def __init__(self, network: PanopticFPN) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pyramid = self.network.features(images)["instance"]
        objectness, deltas = self.network.rpn(pyramid)
        return (*pyramid, *objectness, *deltas, self.network.semantic_head(pyramid))


def unflatten(tensors: tuple[Tensor, ...]) -> DenseOutput:
    """Groups the tensors that `Dense` returns."""
    pyramid, objectness, deltas = (
        list(tensors[start : start + _LEVELS]) for start in range(0, 3 * _LEVELS, _LEVELS)
    )
    return DenseOutput(pyramid, objectness, deltas, tensors[-1])

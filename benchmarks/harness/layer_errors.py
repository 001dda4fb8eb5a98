"""Measures the rounding errors of the 3x3 convolutions of a whole network, on the inputs that its layers get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from panfpn_fast.models import PanopticFPN


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution as a network computes it.

    Attributes:
        name: Name of the module.
        x: Its input [N, C, H, W].
        weight: [K, C, 3, 3].
    """

    name: str
    x: Tensor
    weight: Tensor


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the inputs of our 3x3 convolutions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {value.data_ptr(): name for name, value in network.named_parameters()}
        self.layers: list[Layer] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str(func) in ("panfpn_fast.conv3x3.default", "panfpn_fast.conv3x3_statistics.default"):
            x, weight = args[:2]
            self.layers.append(Layer(self.names[weight.data_ptr()].removesuffix(".weight"), x, weight))
        return func(*args, **(kwargs or {}))


def record(network: PanopticFPN, image: Tensor) -> list[Layer]:
    """Predicts one image and returns the 3x3 convolutions of stride 1 that use `ops.conv3x3`, in order."""
    with torch.no_grad(), _Record(network) as found:
        network([image])
    return found.layers


def _winograd(tile: int) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, weight: Tensor) -> Tensor:
        prepared = torch.ops.panfpn_fast.conv3x3_prepare(weight, tile)
        output: Tensor = torch.ops.panfpn_fast.conv3x3_prepared(
            x, prepared, weight.shape[0], None, False, None
        )
        return output

    return call


def _torch(layout: torch.memory_format) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(
            x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), padding=1
        )

    return call


ALGORITHMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F(4x4, 3x3)": _winograd(4),
    "F(2x2, 3x3)": _winograd(2),
    "PyTorch, channels-last": _torch(torch.channels_last),
    "PyTorch, NCHW": _torch(torch.contiguous_format),
}
"""The convolutions that are measured, by their names in the table."""


def errors(layer: Layer) -> Iterator[tuple[float, float]]:
    """Yields the root mean square and the largest error of each algorithm.

    Both are relative to the root mean square of the exact result.
    """
    exact = F.conv2d(layer.x.double(), layer.weight.double(), padding=1)
    size = float(exact.square().mean().sqrt())
    for algorithm in ALGORITHMS.values():
        difference = algorithm(layer.x, layer.weight).double() - exact
        yield float(difference.square().mean().sqrt()) / size, float(difference.abs().max()) / size

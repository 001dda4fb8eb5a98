"""The network of `eager_network` with its convolutions in an inference engine; what remains is eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from panfpn_fast.models.conv_fusion import fold_norms

from ..harness import engines
from .dense import Dense, DenseOutput, unflatten
from .eager_network import EagerPanopticFPN
from .stand_in import stand_in

_CPU = torch.device("cpu")


def _network(backbone: str) -> EagerPanopticFPN:
    """Returns the eager network in float32, with batch norms folded, which not every engine does by itself."""
    found = stand_in(backbone, _CPU, kind=EagerPanopticFPN, memory_format=torch.contiguous_format)
    assert isinstance(found, EagerPanopticFPN)
    return fold_norms(found)


def dense_model(backbone: str) -> Dense:
    """Returns the module that engines get for the dense part."""
    return Dense(_network(backbone))


@cache
def dense(engine: str, backbone: str, shape: tuple[int, ...], dtype: torch.dtype) -> engines.Compiled:
    """Compiles the dense part of the network for images of a shape [N, 3, H, W]."""
    return engines.compile_module(engine, dense_model(backbone), torch.zeros(shape), dtype=dtype)


class _Part(nn.Module):
    """Makes a method of a head a module that returns a tuple, for export."""

    def __init__(self, head: nn.Module, method: str) -> None:
        super().__init__()
        self.head = head
        self.method = method

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = getattr(self.head, self.method)(x)
        return found if isinstance(found, tuple) else (found,)


@cache
def engine_network(engine: str, backbone: str, dtype: torch.dtype) -> EagerPanopticFPN:
    """Returns a network whose dense part, box head and mask head run in an engine.

    Pooling, decoding, NMS, upsampling and merging are those of `EagerPanopticFPN`. The dense part is compiled for each
    shape of images at its first call.
    """
    found = copy.deepcopy(_network(backbone))
    config = found.config
    pooled = torch.zeros(2, config.branch_channels, config.box_pool_size, config.box_pool_size)
    classify = engines.compile_module(
        engine, _Part(found.box_head, "classify"), pooled.flatten(1), rows=True, dtype=dtype
    )
    pooled = torch.zeros(2, config.branch_channels, config.mask_pool_size, config.mask_pool_size)
    predict = engines.compile_module(
        engine, _Part(found.mask_head, "all_masks"), pooled, rows=True, dtype=dtype
    )
    seen: list[DenseOutput] = []

    def features(images: Tensor, tasks: Sequence[str] | None = None) -> dict[str, list[Tensor]]:
        seen[:] = [unflatten(dense(engine, backbone, tuple(images.shape), dtype)(images))]
        return dict.fromkeys(config.tasks, seen[0].pyramid)

    replaced: list[tuple[Any, str, Any]] = [
        (found, "features", features),
        (found.rpn, "forward", lambda _: (seen[0].objectness, seen[0].deltas)),
        (found.semantic_head, "forward", lambda _: seen[0].semantic),
        (found.box_head, "classify", classify),
        (found.mask_head, "all_masks", lambda x: predict(x)[0]),
    ]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    return found

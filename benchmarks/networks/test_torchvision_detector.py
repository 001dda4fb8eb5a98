"""torchvision's Mask R-CNN, unchanged and after `panfpn_fast.patch("torchvision")`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import panfpn_fast

from ..harness import inputs, peers
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes

Detections = list[dict[str, Tensor]]

# Pooled values differ by rounding and pass through forty layers with random weights, so a few scores change their order
# or cross a threshold.
_SHARE = 0.95


@cache
def _network(size: tuple[int, int], device: torch.device) -> Any:
    """Makes a `maskrcnn_resnet50_fpn_v2` with random weights that does not resize images of a size."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    torch.manual_seed(0)
    network = maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, min_size=min(size), max_size=max(size)
    )
    return network.eval().to(device)


@torch.no_grad()
def _detect(*images: Tensor) -> Detections:
    height, width = images[0].shape[1:]
    return _network((height, width), images[0].device)(list(images))


# Patching takes microseconds, the detector seconds.
def _patched(*images: Tensor) -> Detections:
    panfpn_fast.patch("torchvision")
    return _detect(*images)


def _unpatched(*images: Tensor) -> Detections:
    panfpn_fast.unpatch("torchvision")
    return _detect(*images)


def _arguments(size: tuple[int, int], batch: int) -> Arguments:
    return tuple(inputs.image(size, seed=seed).float() / 255 for seed in range(batch))


def _same_detections(ours: Sequence[dict[str, Tensor]], theirs: Sequence[dict[str, Tensor]]) -> None:
    """Requires nearly every detection of the peer to have one of equal class, box, score and mask among ours."""
    for mine, other in zip(ours, theirs, strict=True):
        assert len(other["boxes"]) > 0, "the peer detected nothing"
        same = mine["labels"][None] == other["labels"][:, None]
        same &= (mine["boxes"][None] - other["boxes"][:, None]).abs().amax(2) < 0.5
        same &= (mine["scores"][None] - other["scores"][:, None]).abs() < 1e-3
        found = same.any(1).nonzero().flatten()
        share = len(found) / max(len(mine["boxes"]), len(other["boxes"]))
        assert share >= _SHARE, f"only {share:.1%} of the detections agree"
        for index in found.tolist():
            apart = mine["masks"][int(same[index].float().argmax())] - other["masks"][index]
            assert float(apart.abs().mean()) < 1e-3, "masks differ"


def _cost(images: Arguments, output: Detections) -> Cost:
    height, width = images[0].shape[1:]
    weights = nbytes(list(_network((height, width), images[0].device).parameters()))
    with FlopCounterMode(display=False) as counter:
        _unpatched(*images)
    return Cost(bytes=nbytes(images) + weights + nbytes(output), flops=counter.get_total_flops())


def _case(size: tuple[int, int], batch: int, *, full: bool) -> Case:
    name = f"maskrcnn_resnet50_fpn_v2, {size[0]} x {size[1]}, batch {batch}"
    return Case(name, partial(_arguments, size, batch), full, highlight=not full)


COMPARISON = Comparison(
    op="patched torchvision",
    ours=_patched,
    peers=[Peer("torchvision", _unpatched, peers.torchvision_problem)],
    cases=[
        _case((480, 640), 1, full=False),
        _case(inputs.IMAGE, 1, full=True),
    ],
    agree=_same_detections,
    cost=_cost,
)


@pytest.fixture(autouse=True)
def _unpatched_afterwards() -> Iterator[None]:
    """Restores torchvision's functions, which are peers in other benchmarks."""
    yield
    panfpn_fast.unpatch("torchvision")


@COMPARISON.rows()
def test_torchvision_detector(row: Row, time_row: Callable[[Row], None], benchmark: Any) -> None:
    problem = peers.torchvision_problem(row.device)
    if problem is not None:
        pytest.skip(problem)
    time_row(row)
    images = row.case.arguments()
    height, width = images[0].shape[1:]
    parameters = _network((height, width), row.device).parameters()
    benchmark.extra_info["parameters"] = sum(parameter.numel() for parameter in parameters)
    if benchmark.enabled:
        benchmark.extra_info["images_per_s"] = len(images) / float(benchmark.stats.stats.median)

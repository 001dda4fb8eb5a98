"""Loading of training data: images and targets, resized and flipped, with the start and the end of the workers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..harness import inputs, peers
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes, no_problem
from . import loading
from .loading import Loaded

# The short edge, the images of a call and of a batch. A call lasts much longer than the start of the workers.
_PHOTOGRAPHS = (inputs.IMAGE[0], 24, 2)
_SCENES = (128, 256, 4)  # as the preset `tiny` trains


def _ours(kind: str, workers: int) -> list[Loaded]:
    if kind == "photographs":
        short_edge, count, batch_size = _PHOTOGRAPHS
        return loading.load_ours(loading.open_photographs(), count, short_edge, batch_size, workers)
    short_edge, count, batch_size = _SCENES
    return loading.load_ours(loading.open_scenes(count), count, short_edge, batch_size, workers)


def _torchvision(kind: str, workers: int) -> list[Loaded]:
    if kind == "photographs":
        short_edge, count, batch_size = _PHOTOGRAPHS
        return loading.load_torchvision(loading.read_photograph, count, short_edge, batch_size, workers)
    short_edge, count, batch_size = _SCENES
    read = partial(loading.read_scene, loading.open_scenes(count))
    return loading.load_torchvision(read, count, short_edge, batch_size, workers)


def _summary(loaded: Loaded) -> tuple[Tensor, list[int]]:
    """Returns numbers that flipping does not change: mean value, size, area of the boxes, share of things; classes."""
    boxes, classes = loaded.boxes.float(), sorted(loaded.classes.tolist())
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum()
    things = (loaded.semantic == 0).float().mean()
    mean = loaded.image.float().mean()
    return torch.stack([mean, *map(torch.tensor, map(float, loaded.image.shape[1:])), area, things]), classes


def _agree(ours: list[Loaded], theirs: list[Loaded]) -> None:
    """Compares all images, whose order and flips are random."""
    pairs = [sorted(map(_summary, found), key=lambda one: float(one[0][0])) for found in (ours, theirs)]
    for (mine, classes), (other, other_classes) in zip(*pairs, strict=True):
        assert classes == other_classes, f"classes {classes} and {other_classes}"
        # torchvision truncates sizes, so that they may differ by a pixel, and has other weights in its resize.
        torch.testing.assert_close(mine, other, rtol=0.005, atol=0.1)


def _cost(arguments: Arguments, output: list[Loaded]) -> Cost:
    return Cost(bytes=nbytes(output), flops=0)


def _case(kind: str, size: str, workers: int) -> Case:
    problem = loading.sample_problem if kind == "photographs" else no_problem
    name = f"{kind}, {size}, {workers or 'no'} worker{'' if workers == 1 else 's'}"
    return Case(name, lambda: (kind, workers), problem=problem)


COMPARISON = Comparison(
    op="data loading",
    ours=_ours,
    peers=[Peer("torchvision and DataLoader", _torchvision, peers.torchvision_problem)],
    cases=[
        _case(kind, size, workers)
        for kind, size in (("photographs", "800 x 1333"), ("synthetic scenes", "128 x 192"))
        for workers in (0, 1, 2)
    ],
    agree=_agree,
    cost=_cost,
    devices=("cpu",),
)


@COMPARISON.rows()
def test_data_loading(row: Row, time_row: Callable[[Row], None], benchmark: Any) -> None:
    time_row(row)
    kind, workers = row.case.arguments()
    images = _PHOTOGRAPHS[1] if kind == "photographs" else _SCENES[1]
    benchmark.extra_info.update(workers=workers, images=images)
    if benchmark.enabled:
        benchmark.extra_info["images_per_s"] = images / float(benchmark.stats.stats.median)

"""Whole predictions, from an image in host memory to a panoptic map there, and how long each stage of them takes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from panfpn_fast.models import PanopticFPN, PanopticFPNConfig
from panfpn_fast.models.fusion import for_prediction
from panfpn_fast.models.panoptic_fpn import PanopticOutput

from . import inputs, peers
from .agreement import PanopticMap, same_maps
from .eager_network import EagerPanopticFPN
from .flops import Boxes, network_flops
from .harness import OURS, Arguments, Case, Comparison, Cost, Peer, Row, nbytes, to_device
from .stages import Part, parts_of, stage_seconds
from .standing_in import standing_in
from .test_semantic_head import no_fast_half

_CITYSCAPES = (512, 1024)

Image = npt.NDArray[np.uint8]  # [3, H, W]
Result = list[PanopticMap]

Network = Callable[[str, Tensor], PanopticFPN]
"""Finds a network by its backbone's name and a tensor of the right dtype, on the right device."""


def _network(kind: Callable[..., PanopticFPN], memory_format: torch.memory_format) -> Network:
    def find(backbone: str, where: Tensor) -> PanopticFPN:
        return standing_in(backbone, where.device, where.dtype, kind=kind, memory_format=memory_format)

    return find


@cache
def _folded(network: PanopticFPN) -> PanopticFPN:
    return for_prediction(network)


def _ours(backbone: str, where: Tensor) -> PanopticFPN:
    """As a Predictor has it."""
    return _folded(standing_in(backbone, where.device, where.dtype))


# In the layout that modules are made with, which is what detectron2 has.
_eager = _network(EagerPanopticFPN, torch.contiguous_format)


def _compiled(network: Network) -> Network:
    """The same with torch.compile around all that has static shapes: up to the proposals, and the semantic head."""

    @cache
    def compile_parts(original: PanopticFPN) -> PanopticFPN:
        found = copy.deepcopy(original)
        for part in (found.backbone, found.fpn, found.rpn, found.semantic_head):
            part.forward = torch.compile(part.forward, dynamic=False)  # type: ignore[method-assign]
        return found

    return lambda backbone, where: compile_parts(network(backbone, where))


_NETWORKS: dict[str, Network] = {
    OURS: _ours,
    "eager": _eager,
    "eager, channels-last": _network(EagerPanopticFPN, torch.channels_last),
    "eager, torch.compile": _compiled(_eager),
    "ours, torch.compile": _compiled(_ours),
}


def copy_to_host(outputs: Sequence[PanopticOutput]) -> Result:
    return [
        PanopticMap(output.panoptic.cpu(), output.segments.isthing.cpu(), output.segments.label.cpu())
        for output in outputs
    ]


def _predict(contender: str) -> Callable[..., Result]:
    def call(backbone: str, where: Tensor, *images: Image) -> Result:
        network = _NETWORKS[contender](backbone, where)
        return copy_to_host(network([torch.from_numpy(image) for image in images]))

    return call


def _arguments(backbone: str, size: tuple[int, int], batch: int, dtype: torch.dtype) -> Arguments:
    # Arrays stay in host memory, where an application has its images; the empty tensor moves to the device.
    images = [inputs.image(size, seed=seed).numpy() for seed in range(batch)]
    return backbone, torch.empty(0, dtype=dtype), *images


def _cost(arguments: Arguments, output: Result) -> Cost:
    backbone, where, *images = arguments
    config = PanopticFPNConfig(backbone=backbone)
    height, width = (-(-side // 32) * 32 for side in images[0].shape[1:])
    # As many as the network keeps at most, which it finds on these images.
    boxes = Boxes(config.rpn_post_nms_topk * len(images), config.detections_per_image * len(images))
    flops = network_flops(config, (height, width), boxes, images=len(images), commuted=False)
    weights = nbytes(list(_ours(backbone, where).parameters()))
    read = sum(image.nbytes for image in images) + weights
    return Cost(bytes=read + nbytes(output), flops=sum(flops.values()))


def _peers() -> list[Peer]:
    def problem(device: torch.device) -> str | None:
        return peers.torchvision_problem(device) or peers.compile_problem(device)

    return [
        Peer("eager", _predict("eager"), peers.torchvision_problem),
        Peer("eager, channels-last", _predict("eager, channels-last"), peers.torchvision_problem, full=True),
        Peer("eager, torch.compile", _predict("eager, torch.compile"), problem, full=True),
        Peer("ours, torch.compile", _predict("ours, torch.compile"), peers.compile_problem, full=True),
    ]


def _case(
    name: str, backbone: str, size: tuple[int, int], batch: int, dtype: torch.dtype, full: bool
) -> Case:
    return Case(
        f"{name}, {size[0]} x {size[1]}, batch {batch}, {str(dtype).removeprefix('torch.')}",
        partial(_arguments, backbone, size, batch, dtype),
        full,
    )


COMPARISON = Comparison(
    op="prediction",
    ours=_predict(OURS),
    peers=_peers(),
    cases=[
        _case("R-50", "resnet50", inputs.IMAGE, 1, torch.float32, full=False),
        _case("R-50", "resnet50", _CITYSCAPES, 1, torch.float32, full=True),
        _case("R-50", "resnet50", inputs.IMAGE, 4, torch.float32, full=True),
        _case("R-101", "resnet101", inputs.IMAGE, 1, torch.float32, full=True),
    ],
    agree=same_maps(0.999),
    cost=_cost,
)

# Where sums are rounded to eight bits, scores that are close change their order and pixels between two classes change
# sides, on these maps of many small segments more than on trained networks'.
HALF = Comparison(
    op="prediction, half precision",
    ours=_predict(OURS),
    peers=_peers(),
    cases=[
        _case("R-50", "resnet50", inputs.IMAGE, 1, torch.bfloat16, full=True),
        _case("R-50", "resnet50", _CITYSCAPES, 4, torch.bfloat16, full=True),
    ],
    agree=same_maps(0.9),
    cost=_cost,
    devices=("cuda",) if no_fast_half(torch.device("cpu")) else ("cpu", "cuda"),
)


def _note(row: Row, benchmark: Any) -> None:
    """Notes images per second, and milliseconds of each stage."""
    arguments = to_device(row.case.arguments(), row.device)
    backbone, where, *images = arguments
    parts = parts_of(_NETWORKS[row.contender](backbone, where))
    parts.append(Part(sys.modules[__name__], "copy_to_host", "copy"))
    seconds = stage_seconds(lambda: row.call(*arguments), parts, row.device)
    benchmark.extra_info["stages_ms"] = {stage: 1e3 * each for stage, each in seconds.items()}
    benchmark.extra_info["images"] = len(images)
    if benchmark.enabled:
        benchmark.extra_info["images_per_s"] = len(images) / float(benchmark.stats.stats.median)


@COMPARISON.rows()
def test_end_to_end(row: Row, time_row: Callable[[Row], None], benchmark: Any) -> None:
    time_row(row)
    _note(row, benchmark)


@HALF.rows()
def test_end_to_end_half(row: Row, time_row: Callable[[Row], None], benchmark: Any) -> None:
    time_row(row)
    _note(row, benchmark)

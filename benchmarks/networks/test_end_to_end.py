"""Whole predictions, from an image in host memory to a panoptic map in host memory, and the time of each stage.

The engines run the dense part, the box head and the mask head; the rest of their predictions is eager PyTorch.
An installed detectron2 predicts with its own model. Its result has more than ours: the masks of all detections, pasted
into the image, and the semantic logits at the image's size.
"""

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
from panfpn_fast.models.conv_fusion import for_prediction
from panfpn_fast.models.outputs import PanopticOutput

from ..harness import engines, inputs, peers
from ..harness.agreement import PanopticMap, same_maps
from ..harness.comparison import OURS, Arguments, Case, Comparison, Cost, Peer, Row, nbytes, to_device
from ..harness.flops import Boxes, network_flops
from ..harness.measuring import bfloat16_problem
from ..harness.stages import Part, parts_of, stage_seconds
from . import detectron2_network
from .eager_network import EagerPanopticFPN
from .engine_network import engine_network
from .stand_in import stand_in

_CITYSCAPES = (512, 1024)

Image = npt.NDArray[np.uint8]  # [3, H, W]
Result = list[PanopticMap]

Network = Callable[[str, Tensor], PanopticFPN]
"""Returns a network for the name of a backbone and a tensor with the dtype and the device to use."""


def _network(kind: Callable[..., PanopticFPN], memory_format: torch.memory_format) -> Network:
    def find(backbone: str, where: Tensor) -> PanopticFPN:
        return stand_in(backbone, where.device, where.dtype, kind=kind, memory_format=memory_format)

    return find


@cache
def _folded(network: PanopticFPN) -> PanopticFPN:
    return for_prediction(network)


def _ours(backbone: str, where: Tensor) -> PanopticFPN:
    """Returns the network that a `Predictor` runs."""
    return _folded(stand_in(backbone, where.device, where.dtype))


# Contiguous, the default layout of modules, which detectron2 uses.
_eager = _network(EagerPanopticFPN, torch.contiguous_format)


def _compiled(network: Network) -> Network:
    """Applies torch.compile to the parts with static shapes: backbone, FPN, RPN and semantic head."""

    @cache
    def compile_parts(original: PanopticFPN) -> PanopticFPN:
        found = copy.deepcopy(original)
        for part in (found.backbone, found.fpn, found.rpn, found.semantic_head):
            part.forward = torch.compile(part.forward, dynamic=False)  # type: ignore[method-assign]
        return found

    return lambda backbone, where: compile_parts(network(backbone, where))


def _engine(name: str) -> Network:
    return lambda backbone, where: engine_network(name, backbone, where.dtype)


_PANOPTIC = "ours, panoptic map only"

_NETWORKS: dict[str, Network] = {
    OURS: _ours,
    _PANOPTIC: _ours,
    "eager": _eager,
    "eager, channels-last": _network(EagerPanopticFPN, torch.channels_last),
    "eager, torch.compile": _compiled(_eager),
    "ours, torch.compile": _compiled(_ours),
    **{name: _engine(name) for name in engines.NAMES},
}


def copy_to_host(outputs: Sequence[PanopticOutput]) -> Result:
    return [
        PanopticMap(output.panoptic.cpu(), output.segments.isthing.cpu(), output.segments.label.cpu())
        for output in outputs
    ]


def _predict(contender: str) -> Callable[..., Result]:
    def call(backbone: str, where: Tensor, *images: Image) -> Result:
        network = _NETWORKS[contender](backbone, where)
        wanted = "panoptic" if contender == _PANOPTIC else "all"
        return copy_to_host(network([torch.from_numpy(image) for image in images], instances=wanted))

    return call


def _detectron2(backbone: str, where: Tensor, *images: Image) -> Result:
    return detectron2_network.predict(backbone, where.device, [torch.from_numpy(image) for image in images])


def _arguments(backbone: str, size: tuple[int, int], batch: int, dtype: torch.dtype) -> Arguments:
    # NumPy arrays stay in host memory, where an application has its images; the empty tensor moves to the device.
    images = [inputs.image(size, seed=seed).numpy() for seed in range(batch)]
    return backbone, torch.empty(0, dtype=dtype), *images


def _cost(arguments: Arguments, output: Result) -> Cost:
    backbone, where, *images = arguments
    config = PanopticFPNConfig(backbone=backbone)
    height, width = (-(-side // 32) * 32 for side in images[0].shape[1:])
    # The largest numbers that the network keeps, which it reaches on these images.
    boxes = Boxes(config.rpn_post_nms_topk * len(images), config.detections_per_image * len(images))
    flops = network_flops(config, (height, width), boxes, images=len(images), commuted=False)
    weights = nbytes(list(_ours(backbone, where).parameters()))
    read = sum(image.nbytes for image in images) + weights
    return Cost(bytes=read + nbytes(output), flops=sum(flops.values()))


_DETECTRON2 = Peer(detectron2_network.NAME, _detectron2, detectron2_network.problem)


def _peers(dtype: torch.dtype) -> list[Peer]:
    def engine_problem(name: str, device: torch.device) -> str | None:
        return peers.torchvision_problem(device) or engines.problem(name, device, dtype)

    def problem(device: torch.device) -> str | None:
        return peers.torchvision_problem(device) or peers.compile_problem(device)

    return [
        Peer(_PANOPTIC, _predict(_PANOPTIC), agree=_identical),
        Peer("eager", _predict("eager"), peers.torchvision_problem),
        Peer("eager, channels-last", _predict("eager, channels-last"), peers.torchvision_problem, full=True),
        Peer("eager, torch.compile", _predict("eager, torch.compile"), problem, full=True),
        Peer("ours, torch.compile", _predict("ours, torch.compile"), peers.compile_problem, full=True),
        *(Peer(name, _predict(name), partial(engine_problem, name)) for name in engines.NAMES),
    ]


def _case(
    name: str,
    backbone: str,
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    *,
    full: bool,
    highlight: bool = False,
) -> Case:
    return Case(
        f"{name}, {size[0]} x {size[1]}, batch {batch}, {str(dtype).removeprefix('torch.')}",
        partial(_arguments, backbone, size, batch, dtype),
        full,
        highlight,
    )


def _identical(ours: Result, theirs: Result) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(*pair) for pair in zip(mine, other, strict=True)), "maps or segments differ"


COMPARISON = Comparison(
    op="prediction",
    ours=_predict(OURS),
    peers=[*_peers(torch.float32), _DETECTRON2],
    cases=[
        _case("R-50", "resnet50", inputs.IMAGE, 1, torch.float32, full=False, highlight=True),
        _case("R-50", "resnet50", _CITYSCAPES, 1, torch.float32, full=True),
        _case("R-50", "resnet50", inputs.IMAGE, 4, torch.float32, full=True),
        _case("R-101", "resnet101", inputs.IMAGE, 1, torch.float32, full=True),
    ],
    agree=same_maps(0.999),
    cost=_cost,
)

# Rounding sums to eight bits changes the order of close scores and the class of pixels between two classes. These maps
# have many small segments, so they change more than maps of trained networks.
HALF = Comparison(
    op="prediction, half precision",
    ours=_predict(OURS),
    peers=_peers(torch.bfloat16),
    cases=[
        _case("R-50", "resnet50", inputs.IMAGE, 1, torch.bfloat16, full=True),
        _case("R-50", "resnet50", _CITYSCAPES, 4, torch.bfloat16, full=True),
    ],
    agree=same_maps(0.9),
    cost=_cost,
    devices=("cuda",) if bfloat16_problem(torch.device("cpu")) else ("cpu", "cuda"),
)


def _note(row: Row, benchmark: Any) -> None:
    """Records images per second and, except for engines, the milliseconds of each stage."""
    arguments = to_device(row.case.arguments(), row.device)
    backbone, where, *images = arguments
    if row.contender not in engines.NAMES:
        if row.peer is _DETECTRON2:
            parts = detectron2_network.parts_of(backbone, where.device)
        else:
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

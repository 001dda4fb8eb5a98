"""Times each stage of a prediction."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch

from panfpn_fast.models import PanopticFPN, panoptic_fpn

_LONG_SECONDS = 1.0
_REPEATS = 5


class Part(NamedTuple):
    """A function that belongs to a stage.

    Attributes:
        owner: The object or module that has the function.
        name: The name of the attribute that holds the function.
        stage: The stage that its time is added to.
    """

    owner: Any
    name: str
    stage: str


def parts_of(network: PanopticFPN) -> list[Part]:
    """Returns the functions of a network for things and stuff, in the order in which a prediction calls them.

    The merging function is the method `merge` of a subclass that has one, else the function of the module
    `panoptic_fpn`.
    """
    return [
        Part(network, "prepare", "prepare"),
        Part(network.backbone, "forward", "backbone"),
        Part(network.fpn, "forward", "fpn"),
        Part(network.rpn, "forward", "rpn"),
        Part(network.rpn, "anchors", "rpn"),
        Part(network.rpn, "propose", "rpn"),
        Part(network.box_head, "forward", "box"),
        Part(network.box_head, "detect", "box"),
        Part(network.mask_head, "forward", "mask"),
        Part(network.semantic_head, "forward", "semantic"),
        Part(network.semantic_head, "label", "semantic"),
        Part(network if hasattr(network, "merge") else panoptic_fpn, "merge", "merge"),
    ]


def _once(call: Callable[[], Any], parts: Sequence[Part], device: torch.device) -> dict[str, float]:
    seconds = {part.stage: 0.0 for part in parts}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def timed(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start, before = now(), sum(seconds.values())
            result = function(*args, **kwargs)
            within = sum(seconds.values()) - before  # of the parts that the function calls
            seconds[stage] += now() - start - within
            return result

        return run

    with ExitStack() as stack:
        for part in parts:
            function = timed(getattr(part.owner, part.name), part.stage)
            stack.enter_context(mock.patch.object(part.owner, part.name, function))
        start = now()
        call()
        total = now() - start
    return seconds | {"rest": total - sum(seconds.values())}


def stage_seconds(call: Callable[[], Any], parts: Sequence[Part], device: torch.device) -> dict[str, float]:
    """Times the stages of a call that has already run once.

    The clock waits for the device at both ends of each stage, which the plain call does not do. On a GPU the sum of
    the stages therefore exceeds the time of the plain call.

    Args:
        call: Calls each function any number of times.
        parts: The functions to time. The time of a function does not include the other ones that it calls.
        device: The device that the functions run on.

    Returns:
        Seconds of each stage, and under "rest" the time outside all stages. For short calls, the medians of a few
        calls.
    """
    runs = [_once(call, parts, device)]
    if sum(runs[0].values()) < _LONG_SECONDS:
        runs = [_once(call, parts, device) for _ in range(_REPEATS)]
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}

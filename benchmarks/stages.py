"""How long each stage of a prediction takes."""

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
        owner: The object or module that has it.
        name: Its attribute there.
        stage: What its time counts to.
    """

    owner: Any
    name: str
    stage: str


def parts_of(network: PanopticFPN) -> list[Part]:
    """The functions of a network for things and stuff, in the order in which a prediction calls them.

    A subclass that merges by itself has a method `merge`.
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
            start = now()
            result = function(*args, **kwargs)
            seconds[stage] += now() - start
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
    """Times the stages of a call that has been made before.

    The device is waited for at both ends of each, which the call by itself does not do: on a GPU their sum is more
    than what the call takes.

    Args:
        call: Calls each of the functions any number of times, none of them from within another one.
        parts: The functions.
        device: Where they run.

    Returns:
        Seconds for each stage, and for "rest" those outside of all; medians of a few calls, if they are short.
    """
    runs = [_once(call, parts, device)]
    if sum(runs[0].values()) < _LONG_SECONDS:
        runs = [_once(call, parts, device) for _ in range(_REPEATS)]
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}

"""Times one network against two, and ops against the PyTorch code that they replace, in a few seconds each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.inference import Predictor
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.models.two_networks import TwoNetworks

Call = Callable[[], Any]


class Comparison(NamedTuple):
    """Median times of two ways to the same result, measured in turn.

    Attributes:
        what: What is computed.
        ours: Seconds of our way.
        peer: The other way.
        theirs: Seconds of the other way.
    """

    what: str
    ours: float
    peer: str
    theirs: float


def compare_networks(
    size: tuple[int, int] = (480, 640), backbone: str = "resnet50", seconds: float = 6.0
) -> Comparison:
    """Times one network for things and stuff against two networks, on the CPU, with random weights.

    Args:
        size: Height and width of the image.
        backbone: The backbone of all networks.
        seconds: The time to measure. Each way runs at least twice.
    """
    torch.manual_seed(0)
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy()
    edges = {"short_edge": min(size), "max_edge": max(size)}

    def network(*tasks: str) -> PanopticFPN:
        return PanopticFPN(backbone=backbone, tasks=tasks, **edges).eval()

    shared = Predictor(network("instance", "semantic"), "cpu", instances="panoptic")
    two = Predictor(TwoNetworks(network("instance"), network("semantic")), "cpu", instances="panoptic")
    ours, theirs = _time(lambda: shared(image), lambda: two(image), seconds)
    return Comparison(f"prediction, {size[0]} x {size[1]}, {backbone}", ours, "two networks", theirs)


def compare_ops(scale: int = 1, seconds: float = 1.5) -> Iterator[Comparison]:
    """Times ops against PyTorch's operations, on the CPU, in the shapes of a Panoptic FPN at 800 x 1344.

    Args:
        scale: Divisor of the heights and widths.
        seconds: The time to measure each op. Each way runs at least twice.

    Yields:
        A comparison for each op. The results are compared before they are timed.
    """
    for what, ours, theirs in _op_calls(scale):
        _check_equal(ours(), theirs())
        our_seconds, their_seconds = _time(ours, theirs, seconds)
        yield Comparison(what, our_seconds, "PyTorch", their_seconds)


def _check_equal(ours: Tensor, theirs: Tensor) -> None:
    """Compares results; a few labels may differ, where two classes are equal up to rounding."""
    if ours.is_floating_point():
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    else:
        assert ours.shape == theirs.shape
        assert float((ours == theirs).float().mean()) > 0.9999


@torch.no_grad()
def _op_calls(scale: int) -> Iterator[tuple[str, Call, Call]]:
    """Yields the name of an op, a call of it, and the same computation by PyTorch."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    def image(channels: int, height: int, width: int) -> Tensor:
        return noise(1, channels, height // scale, width // scale).to(memory_format=torch.channels_last)

    x, weight, bias = image(256, 200, 336), noise(256, 256, 3, 3) / 48, noise(256)
    yield (
        "conv3x3, 256 to 256 channels",
        lambda: ops.conv3x3(x, weight, bias, relu=True),
        lambda: F.conv2d(x, weight, bias, padding=1).relu(),
    )
    y, scales, shifts = image(128, 100, 168), noise(128), noise(128)
    yield (
        "group_norm_relu_upsample",
        lambda: ops.group_norm_relu_upsample(y, scales, shifts, 32),
        lambda: F.interpolate(F.group_norm(y, 32, scales, shifts).relu(), scale_factor=2, mode="bilinear"),
    )
    # The logits of a trained network have large areas of one class.
    logits = F.interpolate(noise(1, 54, 6, 10), (200 // scale, 336 // scale), mode="bilinear")
    logits = logits.to(memory_format=torch.channels_last)
    yield (
        "upsample_argmax, 54 classes",
        lambda: ops.upsample_argmax(logits),
        lambda: F.interpolate(logits, scale_factor=4, mode="bilinear").argmax(1).to(torch.uint8),
    )
    target = torch.randint(0, 54, (1, 4 * logits.shape[2], 4 * logits.shape[3]), generator=random)
    yield (
        "upsample_cross_entropy",
        lambda: ops.upsample_cross_entropy(logits, target, 4),
        lambda: F.cross_entropy(F.interpolate(logits, scale_factor=4, mode="bilinear"), target),
    )


def _time(ours: Call, theirs: Call, seconds: float) -> tuple[float, float]:
    """Returns the median seconds of two calls, which take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    end = 0.0
    with torch.no_grad():
        for call in (ours, theirs):
            call()  # the first calls are slower
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < 2:
            for call, taken in zip((ours, theirs), times, strict=True):
                begin = time.perf_counter()
                call()
                taken.append(time.perf_counter() - begin)
    return median(times[0]), median(times[1])


def format_comparison(one: Comparison) -> str:
    """Formats one row of the table."""
    return (
        f"{one.what:<36} {1000 * one.ours:9.2f} ms   {one.peer:<12} {1000 * one.theirs:9.2f} ms   "
        f"{one.theirs / one.ours:6.2f} times as fast"
    )

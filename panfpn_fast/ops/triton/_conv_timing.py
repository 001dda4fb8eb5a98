"""Times the implementations of a convolution on a GPU; `panfpn_fast.tune` and the maintainers' script use it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import triton
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from panfpn_fast._version import version
from panfpn_fast.ops.triton._conv_choice import Problem
from panfpn_fast.ops.triton._launch import channels_last
from panfpn_fast.ops.triton.conv3x3_statistics import run

Timer = Callable[[Sequence[Callable[[], object]]], list[float]]
"""Milliseconds that each call takes; infinity for a call that fails."""

_ROUNDS = 7
_REPEATS = 20
"""Calls in one replay, so that a replay takes much longer than the resolution of an event, about half a microsecond."""


def versions() -> str:
    """Returns the versions that a measurement was made with."""
    cudnn = torch.backends.cudnn.version()
    return f"panfpn_fast {version()}, torch {torch.__version__}, cuDNN {cudnn}, Triton {triton.__version__}"


def shape_of(problem: Problem) -> tuple[int, int, int]:
    """Returns N, H and W of a map of the problem's size class, in a photograph's proportions."""
    assert problem.pixels is not None
    height = max(math.isqrt(problem.pixels * 3 // 5), 1)
    return 1, height, -(-problem.pixels // height)


def measure(
    problem: Problem, names: Sequence[str], device: torch.device, timer: Timer | None = None
) -> dict[str, float]:
    """Times the named implementations on random values.

    Args:
        problem: The convolution; float32 is computed with or without tf32 as torch's settings say.
        names: The implementations.
        device: The GPU.
        timer: Times the calls; None: `time_on_gpu`.

    Returns:
        Milliseconds by name; infinity for an implementation that fails, for example because it needs more shared
        memory than the GPU has.
    """
    dtype = getattr(torch, problem.precision, torch.float32)  # "tf32" is float32
    batch, height, width = shape_of(problem)
    x = channels_last(torch.randn(batch, problem.in_channels, height, width, device=device).to(dtype))
    weight = torch.randn(problem.out_channels, problem.in_channels, 3, 3, device=device)
    conv_weight = channels_last(weight.to(dtype))
    groups = math.gcd(problem.out_channels, 32)
    calls = [functools.partial(run, name, x, conv_weight, groups, 1e-5) for name in names]
    with torch.no_grad():
        return dict(zip(names, (timer or time_on_gpu)(calls), strict=True))


def time_on_gpu(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Times calls on the current GPU as replays of CUDA graphs, so that the host's launches do not count; see `Timer`.

    Each round replays the graphs in another order.

    Returns:
        The least time of a few rounds, per call.
    """
    times = [math.inf] * len(calls)
    graphs = {}
    for index, call in enumerate(calls):
        try:
            call()  # compiles, and loads the module before the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(_REPEATS):
                    call()
            graphs[index] = graph
        except (RuntimeError, CompilationError, OutOfResources, PTXASError):
            torch.cuda.synchronize()
    order = list(graphs)
    for round_ in range(_ROUNDS if order else 0):
        for index in order[round_ % len(order) :] + order[: round_ % len(order)]:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graphs[index].replay()
            stop.record()
            stop.synchronize()
            times[index] = min(times[index], start.elapsed_time(stop) / _REPEATS)
    return times

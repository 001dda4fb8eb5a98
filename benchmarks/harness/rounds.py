"""Times contenders in interleaved rounds, so that a machine that becomes slower or faster affects all of them alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .measuring import cuda_timer, peak_memory

_MOST_ROUNDS = 500

# If the calls take longer than this on average, there are three rounds, enough for a median.
_SLOW_SECONDS = 0.25
_SLOW_ROUNDS = 3

# A contender's turn in a round lasts about this long, or this share of the slowest contender's turn, with up to
# `_MOST_CALLS` calls. On the GPU, recording the events then adds little. On the CPU, the first call brings back to the
# caches what the previous contender evicted.
_TURN_SECONDS = {"cpu": 5e-3, "cuda": 2e-3}
_TURN_SHARE = 0.05
_MOST_CALLS = 100


@dataclass(frozen=True)
class Timing:
    """The time of a contender.

    Attributes:
        seconds: Mean seconds per call in each round.
        calls: Calls per round.
        memory: Peak memory of a call in bytes, or None where it is not counted.
    """

    seconds: tuple[float, ...]
    calls: int
    memory: int | None


@dataclass(frozen=True)
class Ratio:
    """The time of a contender relative to another one, in interleaved rounds.

    Attributes:
        median: Median of the ratios of the rounds.
        ends: The range of their middle three fifths, from the 20th to the 80th percentile.
    """

    median: float
    ends: tuple[float, float]


def middle(values: tuple[float, ...]) -> tuple[float, float]:
    """Returns the 20th and the 80th percentile; the range of a single value is this value."""
    if len(values) == 1:
        return values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], fifths[-1]


def ratio(theirs: Timing, ours: Timing) -> Ratio:
    """Divides the time of each round by the time of the other contender in the same round."""
    ratios = tuple(their / our for their, our in zip(theirs.seconds, ours.seconds, strict=True))
    return Ratio(statistics.median(ratios), middle(ratios))


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, max_seconds: float, min_rounds: int
) -> dict[str, Timing]:
    """Times several implementations of the same work.

    Each round times all of them, in order in even rounds and in reverse order in odd rounds.

    Args:
        calls: A function for each contender. It has run before.
        device: The device that the functions run on.
        max_seconds: Time for all rounds, per contender.
        min_rounds: Least number of rounds, for calls that are not slow.

    Returns:
        The times of each contender, all with the same number of rounds.
    """
    memory: dict[str, int | None] = {}
    seconds: dict[str, float] = {}
    for name, call in calls.items():
        memory[name], seconds[name] = peak_memory(device, call)
    turn = max(_TURN_SECONDS[device.type], _TURN_SHARE * max(seconds.values()))
    repeats = {name: max(1, min(int(turn / each), _MOST_CALLS)) for name, each in seconds.items()}
    round_seconds = sum(seconds[name] * repeats[name] for name in calls)
    slow = sum(seconds.values()) > _SLOW_SECONDS * len(calls)
    if not slow:  # `peak_memory` has returned the free memory to the system
        for call in calls.values():
            call()
    allowed = int(max_seconds * len(calls) / round_seconds)
    rounds = max(_SLOW_ROUNDS if slow else min_rounds, min(allowed, _MOST_ROUNDS))
    found: dict[str, list[float]] = {name: [] for name in calls}
    read: Callable[[], Any] = cuda_timer if device.type == "cuda" else time.perf_counter
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            call, count = calls[name], repeats[name]
            start = read()
            for _ in itertools.repeat(None, count):
                call()
            found[name].append((read() - start) / count)
    return {name: Timing(tuple(found[name]), repeats[name], memory[name]) for name in calls}


_readings: deque[float] = deque()


def replayed() -> float:
    """A timer for pytest-benchmark, whose readings make `replay` report the times of earlier calls."""
    return _readings.popleft()


def replay(benchmark: Any, timing: Timing) -> None:
    """Reports times that were measured before; the benchmark's timer must be `replayed`."""
    _readings.clear()
    for seconds in timing.seconds:
        _readings.extend((0.0, seconds * timing.calls))
    benchmark.pedantic(lambda: None, rounds=len(timing.seconds), iterations=timing.calls)

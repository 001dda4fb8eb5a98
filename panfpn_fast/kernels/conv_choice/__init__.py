"""Which implementation a convolution runs: cuDNN's with a pass for the statistics, or a configuration of ours.

The first of these that knows decides, for the rest of the process:

1. `table.json`, which ships with the package, for the GPUs in it. It is empty so far: nothing has been measured.
   `python -m panfpn_fast.kernels.conv_choice --save FILE` makes one.
2. `conv_choice.json` in the cache folder ($PANFPN_CACHE, else $XDG_CACHE_HOME/panfpn_fast), where the same versions of
   torch, cuDNN, Triton and this package measured on the same kind of GPU.
3. A measurement at the first call: each of a handful of implementations a few times, some milliseconds in all beside
   what compiling them takes once. It goes into that file. None is made while torch.compile or torch.export traces,
   while a CUDA graph is captured, or under `torch.use_deterministic_algorithms(True)`.
4. A rule, `panfpn_fast.kernels.conv3x3_statistics.rank`.

The environment variable PANFPN_CONV, read at each call, changes this: `known` makes no measurement, `triton` takes ours
by the rule, `cudnn` takes cuDNN's; `measure` is the default.

Sizes are told apart by their number of pixels N * H * W, in classes whose bounds lie a factor of the square root of 2
apart: time hardly depends on more, and images come in hundreds of sizes.
"""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from panfpn_fast._cache import cache_dir

CUDNN = "cudnn"
"""The implementation that is not ours."""

Choices = dict[str, dict[str, dict[str, str]]]
"""Names of implementations by GPU, versions and :attr:`Problem.key`."""

Timer = Callable[[Sequence[Callable[[], object]]], list[float]]
"""Milliseconds that each call takes; infinity for one that fails."""

_MODES = ("measure", "known", "triton", CUDNN)
_FORMAT = 1
_TABLE = Path(__file__).with_name("table.json")
_ROUNDS = 5
_HEAD_START = 2_000_000
"""Clock cycles (a millisecond) by which the host runs ahead, so that its launches are not part of what is timed."""


@dataclass(frozen=True)
class Problem:
    """A convolution, as far as the choice depends on it.

    Attributes:
        gpu: The GPU's name, None where there is none.
        precision: "bfloat16", "float16", "tf32" or "float32".
        pixels: The least number of its size's class, see :func:`size_class`; None where a traced size is left open.
        in_channels: Of its input.
        out_channels: Of its output.
    """

    gpu: str | None
    precision: str
    pixels: int | None
    in_channels: int
    out_channels: int

    @property
    def key(self) -> str:
        """What it is called in files."""
        return f"{self.precision} {self.pixels} pixels {self.in_channels} to {self.out_channels} channels"


def size_class(pixels: int) -> int:
    """The largest number 2^(k/2), rounded up, that is not above a number of pixels; 0 for none."""
    if pixels < 1:
        return 0
    power = 1 << (pixels.bit_length() - 1)
    middle = math.isqrt(2 * power * power - 1) + 1
    return middle if pixels >= middle else power


@lru_cache
def versions() -> str:
    """What a measurement holds for."""
    from panfpn_fast import __version__

    cudnn = torch.backends.cudnn.version()
    return f"panfpn_fast {__version__}, torch {torch.__version__}, cuDNN {cudnn}, Triton {triton.__version__}"


def cache_file() -> Path:
    """Where measurements are kept."""
    return cache_dir() / "conv_choice.json"


def read_choices(path: Path) -> Choices:
    """Reads a file of choices; warns of one that is none, and takes it for an empty one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        choices: Choices = content["choices"]
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']}, not {_FORMAT}")
        for by_versions in choices.values():
            for by_problem in by_versions.values():
                if not all(isinstance(name, str) for name in by_problem.values()):
                    raise ValueError("a name is not a string")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path}: ignored, as it is no table of convolutions ({error!r})", stacklevel=2)
        return {}
    return choices


def write_choices(path: Path, choices: Choices, **notes: Any) -> None:
    """Writes a file of choices, with notes on their origin, beside its place and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    content = {"format": _FORMAT, **notes, "choices": choices}
    part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)


def time_on_gpu(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Times calls in turn, after one of each to compile and warm up; see :data:`Timer`.

    Returns:
        The least of a few rounds.
    """
    times = [math.inf] * len(calls)
    working = []
    for index, call in enumerate(calls):
        try:
            call()
        except (RuntimeError, CompilationError, OutOfResources, PTXASError):
            continue  # of its memory, say, the GPU has too little; another implementation may need less
        working.append(index)
    events = []
    for _ in range(_ROUNDS):
        torch.cuda._sleep(_HEAD_START)
        for index in working:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            calls[index]()
            stop.record()
            events.append((index, start, stop))
    torch.cuda.current_stream().synchronize()
    for index, start, stop in events:
        times[index] = min(times[index], start.elapsed_time(stop))
    return times


@lru_cache
def _read_once(path: Path) -> Choices:
    return read_choices(path)


_decisions: dict[Problem, str] = {}
_lock = threading.Lock()


def forget() -> None:
    """Forgets all decisions and what the files said."""
    with _lock:
        _decisions.clear()
        _read_once.cache_clear()


def _look_up(problem: Problem, names: Sequence[str]) -> str | None:
    if problem.gpu is None:
        return None
    # Another version of torch or Triton changes little, so what ships is taken for all of them.
    shipped = _read_once(_TABLE).get(problem.gpu, {})
    measured = _read_once(cache_file()).get(problem.gpu, {}).get(versions(), {})
    for known in (shipped.get(versions(), {}), *shipped.values(), measured):
        if known.get(problem.key) in names:
            return known[problem.key]
    return None


def _remember(problem: Problem, name: str) -> None:
    path = cache_file()
    # Other processes may have written since this one read: what they found is kept. Two that write at once may lose
    # one's finding, which is then measured again.
    choices = read_choices(path)
    choices.setdefault(str(problem.gpu), {}).setdefault(versions(), {})[problem.key] = name
    try:
        write_choices(path, choices)
    except OSError as error:
        warnings.warn(f"{path}: the measured choice of a convolution was not kept: {error}", stacklevel=2)


def choose(
    problem: Problem, names: Sequence[str], run: Callable[[str], object] | None, timer: Timer | None = None
) -> str:
    """Chooses an implementation.

    Args:
        problem: What is to be computed.
        names: The implementations there are for it; the first is the rule's.
        run: Runs the named one; None where it may not be run.
        timer: Measures; None: :func:`time_on_gpu`.

    Returns:
        One of the names, the same for the same problem until :func:`forget`.

    Raises:
        ValueError: PANFPN_CONV has a value that it does not take.
    """
    mode = os.environ.get("PANFPN_CONV") or "measure"
    if mode not in _MODES:
        raise ValueError(f"PANFPN_CONV: expected one of {', '.join(_MODES)}, got {mode!r}")
    if mode == CUDNN:
        return CUDNN
    if mode == "triton":
        return next((name for name in names if name != CUDNN), CUDNN)
    if problem.pixels is None:
        return names[0]
    if problem in _decisions:
        return _decisions[problem]
    with _lock:
        if problem not in _decisions:
            name = _look_up(problem, names)
            if name is None and run is not None and mode == "measure" and len(names) > 1:
                times = (timer or time_on_gpu)([partial(run, name) for name in names])
                best = min(range(len(names)), key=times.__getitem__)
                name = names[best]
                if math.isfinite(times[best]):
                    _remember(problem, name)
            _decisions[problem] = name if name is not None else names[0]
        return _decisions[problem]

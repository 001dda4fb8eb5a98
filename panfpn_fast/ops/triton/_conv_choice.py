"""Chooses which implementation computes a convolution: cuDNN's with a statistics pass, or one of our configurations.

The first source that has an answer decides:

1. the file that `panfpn_fast.load_tuning` read or `panfpn_fast.tune` made in this process;
2. the file that the environment variable PANFPN_TUNING names, which is read once;
3. `conv_choice.json`, the table that ships with the package. It is empty so far: nothing has been measured;
4. the rule, `panfpn_fast.ops.triton.conv3x3_statistics.rank`.

Nothing is measured here, so equal processes on equal GPUs choose equally, and tracing changes nothing. The environment
variable PANFPN_CONV, read at each choice, overrides all of them: `triton` takes our implementation by the rule, `cudnn`
takes cuDNN's.

Sizes are distinguished by their number of pixels N * H * W, in classes whose bounds are a factor of sqrt(2) apart: the
time hardly depends on anything else, and images come in hundreds of sizes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from panfpn_fast._files import atomic_write

CUDNN = "cudnn"
"""The implementation that is not ours."""

Choices = dict[str, dict[str, dict[str, str]]]
"""Names of implementations by GPU, by versions and by `Problem.key`."""

_MODES = ("triton", CUDNN)
_FORMAT = 1
_SHIPPED = Path(__file__).with_name("conv_choice.json")


@dataclass(frozen=True)
class Problem:
    """A convolution, described as far as the choice depends on it.

    Attributes:
        gpu: The GPU's name; None without a GPU.
        precision: "bfloat16", "float16", "tf32" or "float32".
        pixels: The lower bound of its size class, see `size_class`; None for a traced size that stays symbolic.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    gpu: str | None
    precision: str
    pixels: int | None
    in_channels: int
    out_channels: int

    @property
    def key(self) -> str:
        """The problem's name in files."""
        return f"{self.precision} {self.pixels} pixels {self.in_channels} to {self.out_channels} channels"


def size_class(pixels: int) -> int:
    """Returns the largest number 2^(k/2), rounded up, that is not above a number of pixels; 0 for no pixels."""
    if pixels < 1:
        return 0
    power = 1 << (pixels.bit_length() - 1)
    middle = math.isqrt(2 * power * power - 1) + 1
    return middle if pixels >= middle else power


def read_choices(path: Path) -> Choices:
    """Reads a file of choices.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not such a file; the message names the file and the defect.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version reads format {_FORMAT}")
        choices: Choices = content["choices"]
        for by_versions in choices.values():
            for by_problem in by_versions.values():
                if not all(isinstance(name, str) for name in by_problem.values()):
                    raise ValueError("the name of an implementation is not a string")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a tuning file as panfpn_fast.tune writes it, got a file with a defect: {error!r}"
        ) from error
    return choices


def write_choices(path: Path, choices: Choices, **notes: Any) -> None:
    """Writes a file of choices atomically, with notes on their origin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": _FORMAT, **notes, "choices": choices}
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


generation = 0
"""Increases whenever the answers of `choose` may change; caches that hold an answer compare it."""

_tuned: Choices = {}
_recorders: list[dict[Problem, Sequence[str]]] = []


def use(choices: Mapping[str, Mapping[str, Mapping[str, str]]]) -> None:
    """Adds choices to those of this process; they replace earlier ones for the same problem."""
    global generation
    for gpu, by_versions in choices.items():
        for versions, by_problem in by_versions.items():
            _tuned.setdefault(gpu, {}).setdefault(versions, {}).update(by_problem)
    generation += 1


def forget() -> None:
    """Drops the choices of this process and rereads the files at the next choice."""
    global generation
    _tuned.clear()
    _file_choices.cache_clear()
    generation += 1


@contextmanager
def recorded() -> Iterator[dict[Problem, Sequence[str]]]:
    """Collects the problems, with the implementations for each, that `choose` is asked for inside the block."""
    global generation
    problems: dict[Problem, Sequence[str]] = {}
    _recorders.append(problems)
    generation += 1  # so that cached answers are asked for again
    try:
        yield problems
    finally:
        _recorders.remove(problems)


@cache
def _file_choices() -> tuple[Choices, ...]:
    named = os.environ.get("PANFPN_TUNING")
    shipped = read_choices(_SHIPPED)
    return (read_choices(Path(named).expanduser()), shipped) if named else (shipped,)


def _look_up(problem: Problem, names: Sequence[str]) -> str | None:
    if problem.gpu is None:
        return None
    for choices in (_tuned, *_file_choices()):
        # Versions of torch and Triton change little: the newest entry for the GPU holds for all of them.
        for by_problem in reversed(choices.get(problem.gpu, {}).values()):
            if by_problem.get(problem.key) in names:
                return by_problem[problem.key]
    return None


def choose(problem: Problem, names: Sequence[str]) -> str:
    """Chooses an implementation; a pure function of the problem, the files and `PANFPN_CONV`.

    Args:
        problem: The convolution.
        names: The implementations that can compute it, the rule's first.

    Returns:
        One of the names, or "cudnn" where `PANFPN_CONV=cudnn` asks for it.

    Raises:
        ValueError: If PANFPN_CONV has an unknown value, or the file that PANFPN_TUNING names is invalid.
        OSError: If that file cannot be read.
    """
    for problems in _recorders:
        problems[problem] = names
    mode = os.environ.get("PANFPN_CONV")
    if mode and mode not in _MODES:
        raise ValueError(f"PANFPN_CONV: expected {' or '.join(_MODES)} or nothing, got {mode!r}")
    if mode == CUDNN:
        return CUDNN
    if mode == "triton":
        return next((name for name in names if name != CUDNN), CUDNN)
    return _look_up(problem, names) or names[0]

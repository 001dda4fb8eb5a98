"""Measures which implementation of each convolution is fastest on a GPU, when asked to."""

from __future__ import annotations

import datetime
import importlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from panfpn_fast.ops._checks import check_int, int_pair


def tune(
    model: nn.Module,
    sizes: Sequence[tuple[int, int]],
    path: str | os.PathLike[str] | None = None,
    *,
    batch: int = 1,
) -> dict[str, str]:
    """Measures the convolutions of a network's semantic head on its GPU and uses the fastest from now on.

    Without tuning a rule and a table that ships with the package choose. Tuning takes seconds for each size, mostly
    for compiling.

    Args:
        model: A `PanopticFPN` or `TwoNetworks` on a CUDA device, in the dtype that it predicts in.
        sizes: Heights and widths of images as the network sees them, after resizing.
        path: A JSON file to write the choices to, or None. `load_tuning` reads it, or the environment variable
            PANFPN_TUNING names it; it may be passed on to other machines with the same kind of GPU.
        batch: Images per pass.

    Returns:
        The name of the chosen implementation for each convolution that was measured, for example
        {"bfloat16 65536 pixels 256 to 128 channels": "128x128-4-3"}.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the model is not on a CUDA device, or a size or `batch` is below 1.
        OSError: If the file cannot be written.

    Note:
        Implementations differ by rounding. Choices are the same in all processes that read the same file, which
        distributed training needs for equal results on all ranks. Synchronizes with the GPU and allocates memory, so no
        other thread may capture a CUDA graph meanwhile.

    Example:
        >>> from panfpn_fast import PanopticFPN, tune
        >>> model = PanopticFPN().eval()
        >>> tune(model, [(800, 1216)])
        Traceback (most recent call last):
        ...
        ValueError: model: expected a model on a CUDA device, which has a choice of convolutions; got one on cpu
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a PanopticFPN, got {type(model).__name__}")
    checked = [int_pair(f"sizes[{i}]", size, 1) for i, size in enumerate(sizes)]
    check_int("batch", batch)
    if batch < 1:
        raise ValueError(f"batch: expected an integer of at least 1, got {batch}")
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(
            f"model: expected a model on a CUDA device, which has a choice of convolutions; got one on {device}"
        )
    return _tune(model, checked, None if path is None else Path(path), batch, device)


def _tune(
    model: nn.Module, sizes: Sequence[tuple[int, int]], path: Path | None, batch: int, device: torch.device
) -> dict[str, str]:
    # Imported here, because these modules import Triton.
    choice = importlib.import_module("panfpn_fast.ops.triton._conv_choice")
    timing = importlib.import_module("panfpn_fast.ops.triton._conv_timing")
    chosen: dict[str, dict[str, str]] = {}
    with torch.cuda.device(device), torch.inference_mode():
        with choice.recorded() as problems:
            for height, width in sizes:
                model([torch.zeros(3, height, width, dtype=torch.uint8, device=device)] * batch)
        for problem, names in problems.items():
            times = timing.measure(problem, names, device)
            best = min(times, key=times.__getitem__, default=names[0])
            if math.isfinite(times.get(best, math.inf)):
                chosen.setdefault(problem.gpu, {})[problem.key] = best
    choices = {gpu: {timing.versions(): by_problem} for gpu, by_problem in chosen.items()}
    choice.use(choices)
    if path is not None:
        choice.write_choices(path, choices, made=f"panfpn_fast.tune, {datetime.date.today()}")
    return {key: name for by_problem in chosen.values() for key, name in by_problem.items()}


def load_tuning(path: str | os.PathLike[str]) -> None:
    """Uses the choices in a file that `tune` wrote, for the rest of the process.

    Args:
        path: The file. Entries for other kinds of GPU than this machine's have no effect.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not such a file.
    """
    choice = importlib.import_module("panfpn_fast.ops.triton._conv_choice")
    choice.use(choice.read_choices(Path(path)))

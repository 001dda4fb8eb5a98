"""Measures the error of each op and of PyTorch against float64: `python -m benchmarks.scripts.numerics`.

Writes docs/numerics.md from the `ACCURACY` of each file in benchmarks/ops. Inputs are rounded to the dtype first, so
that only the error of the computation is measured.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import ops
from ..harness import inputs, layer_errors
from ..harness.accuracy import AccuracyCase
from ..harness.measuring import device_name
from ..networks.stand_in import stand_in
from .report.results import ROOT

PAGE = ROOT / "docs" / "numerics.md"
_INTRODUCTION = """\
# Numerics

The error of each op against the same computation in float64, and the error of eager PyTorch in the same dtype.
Inputs are rounded to the dtype first, so that only the error of the computation is measured. Each entry has
the root mean square error and the largest error, both relative to the root mean square of the exact result:
ours · PyTorch's.
"""

_NOTES = """\
- For half types, our ops accumulate sums in float32 and round once at the end. PyTorch rounds after each of
  the operations that one of our ops replaces, which explains its larger errors in half precision.
- The statistics of GroupNorm are combined as means and sums of squared deviations, never as sums of squares.
- Bilinear weights of integer factors come from integer arithmetic, so they are exact up to one rounding.
- On CUDA, float32 convolutions use tf32 where `torch.backends.cudnn.conv.fp32_precision` allows it, which is
  torch's default, and the 1x1 convolution of `conv_gn_relu_project` follows the setting of matrix products,
  which is full float32 by default. Triton's tf32 products truncate their operands and do not round them: up to
  twice the error of rounding, towards zero.
- `nms`, `paste_masks` and `panoptic_merge` return choices. Their docstrings state the order of float32
  operations that decides at a threshold; tests allow different choices only within rounding of the threshold.
"""

_LAYERS = """\
## 3x3 convolutions of a network

float32 errors of the algorithms on the layers of a ResNet-50 network with 480 x 640 pixels, in the form of the table
above: for each part of the network the largest of its layers' root mean square errors, and the largest error. The
weights are random, and the inputs are those that the layers get when the network predicts. `ops.conv3x3` uses
F(4x4, 3x3) with the points 0, sqrt(1/2), -sqrt(1/2), sqrt(2), -sqrt(2) and infinity, and sums at most 64 channels in
one chain. PyTorch's errors depend on the layout, since oneDNN sums in another order.
"""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases() -> list[AccuracyCase]:
    """Collects the cases of all ops, sorted by name, whose peers run on the CPU."""
    modules = [
        importlib.import_module(f"{ops.__name__}.{found.name}")
        for found in pkgutil.iter_modules(ops.__path__)
    ]
    found = [case for module in modules for case in getattr(module, "ACCURACY", ())]
    cpu = torch.device("cpu")
    return sorted((case for case in found if case.problem(cpu) is None), key=lambda case: case.name)


def error(result: Tensor, exact: Tensor, is_choice: bool) -> tuple[float, float]:
    """Computes the root mean square error and the largest error, relative to the root mean square of `exact`.

    For choices, both are the share of results that differ.
    """
    if is_choice:
        differing = float((result.long() != exact.long()).double().mean())
        return differing, differing
    difference = result.double() - exact
    size = float(exact.square().mean().sqrt())
    return float(difference.square().mean().sqrt()) / size, float(difference.abs().max()) / size


def _cast(arguments: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(device, dtype) if floating else leaf.to(device)

    return tree_map(cast, arguments)


def _cell(ours: tuple[float, float], theirs: tuple[float, float] | None, is_choice: bool) -> str:
    if theirs is None:
        return f"{ours[0]:.1e}, {ours[1]:.1e} · not supported"
    if is_choice:
        return f"{ours[0]:.1e} · {theirs[0]:.1e}"
    return f"{ours[0]:.1e}, {ours[1]:.1e} · {theirs[0]:.1e}, {theirs[1]:.1e}"


def row(case: AccuracyCase, device: torch.device) -> str:
    """Measures one line of the table."""
    cells = []
    for dtype in DTYPES:
        arguments = _cast(case.arguments(), dtype, device)
        exact = case.pytorch(*_cast(arguments, torch.float64, torch.device("cpu")))
        ours = error(case.ours(*arguments).cpu(), exact, case.is_choice)
        try:
            theirs = error(case.pytorch(*arguments).cpu(), exact, case.is_choice)
        except (RuntimeError, NotImplementedError):
            theirs = None  # The peer does not support the dtype.
        cells.append(_cell(ours, theirs, case.is_choice))
    return f"| {case.name} | {' | '.join(cells)} |"


def _part(name: str) -> str:
    """Returns the part of the network that a layer belongs to."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "backbone" else parts[0]


def layers_table() -> list[str]:
    """Measures the 3x3 convolutions of a network; returns the lines of the section, none where torch computes them."""
    layers = layer_errors.record(stand_in("resnet50", torch.device("cpu")), inputs.image((480, 640), seed=0))
    if not layers:
        return []
    found: dict[str, list[list[tuple[float, float]]]] = {}
    channels: dict[str, str] = {}
    for layer in layers:
        found.setdefault(_part(layer.name), []).append(list(layer_errors.errors(layer)))
        channels[_part(layer.name)] = f"{layer.weight.shape[1]} to {layer.weight.shape[0]}"
    lines = [
        _LAYERS,
        f"| part | channels | {' | '.join(layer_errors.ALGORITHMS)} |",
        f"|---|---|{'---|' * len(layer_errors.ALGORITHMS)}",
    ]
    for part, measured in found.items():
        worst = [tuple(map(max, zip(*of, strict=True))) for of in zip(*measured, strict=True)]
        cells = " | ".join(f"{rms:.1e}, {most:.1e}" for rms, most in worst)
        lines.append(f"| {part} | {channels[part]} | {cells} |")
    return [*lines, ""]


def page(device: torch.device) -> str:
    """Measures all ops; returns the page in Markdown."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    made_by = f"`python -m benchmarks.scripts.numerics` on {device_name(device)}, torch {torch.__version__}"
    lines = [
        _INTRODUCTION,
        f"{made_by}, {datetime.date.today().isoformat()}. `roi_align` is compared with torchvision's.",
        "",
        f"| op | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        *(row(case, device) for case in cases()),
        "",
        *(layers_table() if device.type == "cpu" else []),
        _NOTES,
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cpu"), help="the device to run on (default: cpu)"
    )
    parser.add_argument(
        "--out", type=Path, default=PAGE, help="the file to write (default: docs/numerics.md)"
    )
    options = parser.parse_args()
    text = page(options.device)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)


if __name__ == "__main__":
    main()

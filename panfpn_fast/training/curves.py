"""Draws the losses, the learning rate and the figures of a run over its steps."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panfpn_fast._errors import one_line
from panfpn_fast._files import atomic_write
from panfpn_fast.training.evaluations import FILE
from panfpn_fast.training.json_lines import read_lines
from panfpn_fast.training.logging import LOG

CURVES = "curves.png"
"""Name of the picture, in the folder of the run."""

_Panel = tuple[str, Sequence[Mapping[str, Any]], Sequence[str]]
"""Title, rows of figures by name, and the names that are drawn."""

_SHOWN = ("PQ", "PQ_things", "PQ_stuff", "mIoU", "fIoU", "iIoU", "box_AP", "mask_AP")
"""Figures of the evaluations that are drawn. More lines could not be told apart."""


def draw_curves(folder: Path) -> str:
    """Draws `curves.png` from the logs of a run, if matplotlib is installed.

    Args:
        folder: Folder of the run.

    Returns:
        A message for the user: where the picture is, or why there is none.

    Raises:
        OSError: If the logs cannot be read or the picture cannot be written.
    """
    try:
        figure_of = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        return f"{CURVES} is not drawn, because matplotlib is not installed; pip install matplotlib"
    except Exception as error:  # its packages do not fit together
        return f"{CURVES} is not drawn, because matplotlib cannot be imported: {one_line(error):.80}"
    lines = [line for line in read_lines(folder / LOG) if "loss" in line]
    evaluations = [{"step": line["step"], **line.get("summary", {})} for line in read_lines(folder / FILE)]
    losses = list(dict.fromkeys(name for line in lines for name in line if name.startswith("loss")))
    panels: list[_Panel] = [("loss", lines, losses), ("learning rate", lines, ["learning_rate"])]
    if evaluations:
        panels.append(("evaluation", evaluations, _SHOWN))
    figure = figure_of(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, rows, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _draw(axes, rows, names)
        axes.set(title=title, xlabel="step")
    with atomic_write(folder / CURVES) as file:
        figure.savefig(file, format="png", dpi=120)
    return f"curves: {folder / CURVES}"


def _draw(axes: Any, lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            # A single point has no line.
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) == 1 else "")
    if len(axes.lines) > 1:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)

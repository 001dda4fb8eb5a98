"""The evaluations of a run: which was the best, and how many have passed since."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from panfpn_fast._errors import UserError, similar
from panfpn_fast.metrics.coco_ap import AP_FIGURES
from panfpn_fast.metrics.tables import KINDS, QUALITIES, SUFFIX, without_nan
from panfpn_fast.models.config import PanopticFPNConfig
from panfpn_fast.training.json_lines import forget_after, read_lines

FILE = "evaluations.jsonl"
"""Name of the file with all figures of each evaluation, in the folder of the run."""

OF_AP = tuple(f"{kind}_{figure}" for kind in ("box", "mask") for figure in AP_FIGURES)
"""Names of the figures that need pycocotools."""


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation.

    Attributes:
        figures: Figures of all classes together, such as PQ; NaN where nothing was counted.
        classes: Figures of each class by its name.
        table: All figures as text, which is printed.
        pictures: Predictions beside their images and annotations; only in the first process, or None.
    """

    figures: dict[str, float]
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    table: str = ""
    pictures: Image.Image | None = None


def best_figure(chosen: str, network: PanopticFPNConfig) -> str:
    """Returns the name of the figure by which the best checkpoint of a network is chosen.

    Args:
        chosen: The setting `best_by`; empty for "PQ", or for "mask_AP" if the network has no branch for stuff.
        network: Settings of the network.

    Raises:
        UserError: If the evaluation of the network does not give the figure.
    """
    if not chosen:
        return "PQ" if "semantic" in network.tasks else "mask_AP"
    known = [name + SUFFIX[kind] for kind in KINDS for name in QUALITIES]
    if "semantic" in network.tasks:
        known += ["mIoU", "mIoU_annotated", "fIoU"]
    if "instance" in network.tasks:
        known += OF_AP
    if chosen not in known:
        raise UserError(
            f"best_by: expected a figure that the evaluation of this network gives, got {chosen!r:.40}; similar ones: "
            f"{similar(chosen, known)}"
        )
    return chosen


class Evaluations:
    """The evaluations of a run so far, which `evaluations.jsonl` keeps for a resumed run.

    Args:
        folder: Folder of the run.
        figure: Name of the figure by which evaluations are compared; larger is better.
        step: Steps that the run has taken; the evaluations after them are forgotten.
    """

    def __init__(self, folder: Path, figure: str, step: int) -> None:
        self.figure = figure
        self._path = folder / FILE
        self._lines = read_lines(self._path, step)

    @property
    def last_step(self) -> int:
        """Steps before the last evaluation; 0 if there was none."""
        return int(self._lines[-1]["step"]) if self._lines else 0

    @property
    def figures(self) -> dict[str, float]:
        """The figures of the last evaluation; empty if there was none."""
        found = self._lines[-1].get("summary", {}) if self._lines else {}
        return {name: math.nan if value is None else value for name, value in found.items()}

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and figure of the best evaluation, the first one of equal ones; None if no figure is a number."""
        numbered = [(line["step"], _value(line, self.figure)) for line in self._lines]
        return max(
            ((step, value) for step, value in numbered if not math.isnan(value)),
            key=lambda pair: pair[1],
            default=None,
        )

    @property
    def since_best(self) -> int:
        """Number of evaluations after the best one; of all evaluations if no figure is a number."""
        best = self.best
        return sum(best is None or line["step"] > best[0] for line in self._lines)

    def add(self, step: int, evaluated: Evaluated) -> None:
        """Adds an evaluation."""
        line = {"step": step, "summary": evaluated.figures, "classes": evaluated.classes}
        self._lines.append(without_nan(line))

    def truncate_file(self) -> None:
        """Removes from the file what this object has forgotten."""
        forget_after(self._path, self.last_step)

    def append_to_file(self) -> None:
        """Writes the last evaluation."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self._lines[-1], allow_nan=False) + "\n")


def _value(line: dict[str, Any], figure: str) -> float:
    value = line.get("summary", {}).get(figure)
    return float(value) if isinstance(value, int | float) else math.nan

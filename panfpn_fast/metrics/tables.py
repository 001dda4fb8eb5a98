"""Formats metrics as text and for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from panfpn_fast.metrics.coco_ap import AP_FIGURES

QUALITIES = ("PQ", "SQ", "RQ")
KINDS = ("All", "Things", "Stuff")
SUFFIX = {"All": "", "Things": "_things", "Stuff": "_stuff"}


def without_nan(figures: Any) -> Any:
    """Returns the same nested dictionaries and lists with None for every NaN, because JSON has no NaN."""
    if isinstance(figures, dict):
        return {name: without_nan(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [without_nan(value) for value in figures]
    return None if isinstance(figures, float) and math.isnan(figures) else figures


def _cell(value: float) -> str:
    if isinstance(value, int):
        return f"{value:7d}"
    return f"{'-':>7}" if math.isnan(value) else f"{value:7.2f}"


def format_table(result: dict[str, Any]) -> str:
    """Formats metrics as text: panoptic quality of all, things and stuff; the other metrics; and each class.

    Example:
        >>> summary = {"PQ": 50.0, "SQ": 75.0, "RQ": 66.7, "PQ_things": 50.0, "SQ_things": 75.0, "RQ_things": 66.7,
        ...            "PQ_stuff": 0.0, "SQ_stuff": 0.0, "RQ_stuff": 0.0, "mIoU": float("nan"), "fIoU": 80.0}
        >>> dog = {"PQ": 50.0, "SQ": 75.0, "RQ": 66.7, "TP": 1, "FP": 1, "FN": 0}
        >>> print(format_table({"summary": summary, "per_class": {"dog": dog}, "images": 1, "skipped": []}))
                    PQ      SQ      RQ
        All      50.00   75.00   66.70
        Things   50.00   75.00   66.70
        Stuff     0.00    0.00    0.00
        <BLANKLINE>
        mIoU       -    fIoU   80.00
        <BLANKLINE>
                    PQ      SQ      RQ      TP      FP      FN
        dog      50.00   75.00   66.70       1       1       0
        <BLANKLINE>
        1 images
    """
    summary, per_class = dict(result["summary"]), result["per_class"]
    width = max(map(len, (*KINDS, *per_class)))

    def table(columns: Sequence[str], rows: Mapping[str, Sequence[float]]) -> list[str]:
        lines = [" ".join((" " * width, *(f"{column:>7}" for column in columns)))]
        return lines + [" ".join((f"{name:{width}}", *map(_cell, values))) for name, values in rows.items()]

    lines = table(
        QUALITIES,
        {kind: [summary.pop(name + SUFFIX[kind]) for name in QUALITIES] for kind in KINDS},
    )
    if "box_AP" in summary:
        rows = {
            kind: [summary.pop(f"{kind.lower()}_{name}") for name in AP_FIGURES] for kind in ("Box", "Mask")
        }
        lines += ["", *table(AP_FIGURES, rows)]
    if summary:
        lines += ["", "    ".join(f"{name} {_cell(value)}" for name, value in summary.items())]
    columns = (*QUALITIES, "TP", "FP", "FN")
    rows = {name: [found[column] for column in columns] for name, found in per_class.items()}
    lines += ["", *table(columns, rows)]
    lines += ["", f"{result['images']} images"]
    if result["skipped"]:
        lines[-1] += f", and {len(result['skipped'])} that could not be read:"
        lines += result["skipped"]
    return "\n".join(lines)

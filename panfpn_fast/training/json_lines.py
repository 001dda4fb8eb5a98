"""Files with one JSON object a line, each of which belongs to a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def _kept(path: Path, step: float) -> list[tuple[str, dict[str, Any]]]:
    """Returns the lines up to a step as text and content; stops at the first incomplete or damaged line."""
    kept: list[tuple[str, dict[str, Any]]] = []
    if not path.exists():
        return kept
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            content = json.loads(line)
            if content["step"] <= step:
                kept.append((line, content))
        except (ValueError, TypeError, LookupError):
            break
    return kept


def read_lines(path: Path, step: float = math.inf) -> list[dict[str, Any]]:
    """Returns the objects of a file up to a step; a file that is missing has none."""
    return [content for _, content in _kept(path, step)]


def forget_after(path: Path, step: int) -> None:
    """Removes the lines after a step; the run was killed after them and will repeat those steps."""
    if path.exists():
        path.write_text("".join(line for line, _ in _kept(path, step)), encoding="utf-8")

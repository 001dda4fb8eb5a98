"""Damages annotation files in the ways that users and scripts do, for tests with hypothesis."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from PIL import Image

VALUES: list[Any] = [
    None,
    True,
    False,
    "",
    "1",
    "a.png",
    "\0",
    "\ud800",
    -1,
    0,
    1,
    2,
    1.0,
    1.5,
    1e308,
    2**24,
    2**63,
    10**30,
]
VALUES += [float("nan"), float("inf"), [], [1], [[]], {}, {"id": 1}, "x" * 300, ".", "/"]

bounded = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def places(value: Any, path: tuple[int | str, ...] = ()) -> Iterator[tuple[int | str, ...]]:
    """The paths of all values in a JSON document, the document itself included."""
    yield path
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def change(content: Any, path: tuple[int | str, ...], kind: str, value: Any) -> Any:
    """Replaces, drops or duplicates the value at a path."""
    if not path:
        return copy.deepcopy(value)  # the next change may be inside it
    parents = path[:-1]
    key: Any = path[-1]
    parent: Any = content
    for step in parents:
        parent = parent[step]
    if kind == "drop":
        del parent[key]
    elif kind == "duplicate" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    else:
        parent[key] = copy.deepcopy(value)
    return content


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)

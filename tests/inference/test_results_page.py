"""Runs the Python blocks of docs/results.md, with a stand-in for the published network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageShow

from support.repository import repository


def test_the_page_runs(
    halves_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = repository(monkeypatch) / "docs" / "results.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("panfpn_fast.checkpoints.load", lambda name: halves_model(short_edge=30))
    shown: list[Image.Image] = []

    def show(picture: Image.Image) -> bool:
        shown.append(picture)
        return True

    monkeypatch.setattr(ImageShow, "show", show)
    photo = Image.fromarray(np.full((30, 50, 3), 90, np.uint8))
    Path("photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg", "photos/b.jpg"):
        photo.save(name)

    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, page.name, "exec"), names)
    assert len(shown) == 1
    assert Path("drawn.png").is_file()
    assert Path("drawn.jpg").is_file()
    assert [(one["id"], one["image_id"]) for one in names["annotations"]] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    json.dumps(names["annotations"])

"""The commands and the Python blocks of docs/sources.md run, with a stand-in for the published network."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from panfpn_fast import Predictor
from panfpn_fast.cli.main import main
from support.predict_runs import OneDogModel, photo, replace_load
from support.repository import repository
from support.video_samples import frames, write_video


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (repository(monkeypatch) / "docs" / "sources.md").read_text()
    monkeypatch.chdir(tmp_path)
    replace_load(monkeypatch)
    for name in ("photo.jpg", "photos/a.jpg", "photos/b/c.jpg"):
        photo(Path(name))
    write_video(Path("clip.mp4"), frames(7))

    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    network = OneDogModel()
    monkeypatch.setattr(
        "panfpn_fast.Predictor", lambda _: Predictor(network, "cpu", short_edge=32, instances="panoptic")
    )
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "sources.md", "exec"), names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "panfpn-fast"
            assert main([*arguments, "--short-edge", "32", "--device", "cpu"]) == 0, capsys.readouterr().err
    assert names["dogs"] == 2
    for made in (
        "photo_overlay.png",
        "c_overlay.png",
        "a_overlay.jpg",
        "clip_overlay.mp4",
        "predictions.json",
    ):
        assert Path("out", made).is_file()

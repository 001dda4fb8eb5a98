"""Runs the tutorials of the documentation, block by block, as a reader would."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from panfpn_fast.cli.main import main
from support.repository import repository


@pytest.fixture
def tutorials(one_thread: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = repository(monkeypatch) / "docs" / "tutorials"
    monkeypatch.chdir(tmp_path)
    return folder


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yields the language and the text of each block of code."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def run_tutorial(page: Path, *, with_commands: bool) -> None:
    """Runs the Python blocks in one namespace and, if wanted, the commands, in the current directory."""
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
        elif with_commands:
            for line in text.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line)
                assert program == "panfpn-fast"
                assert main(arguments) == 0


def test_predict(tutorials: Path) -> None:
    run_tutorial(tutorials / "predict.md", with_commands=False)
    assert Path("overlay.png").is_file()
    assert Path("out/predictions/nuclei.png").is_file()


def test_train(tutorials: Path) -> None:
    pytest.importorskip("omegaconf", reason="omegaconf is not installed")
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    run_tutorial(tutorials / "train.md", with_commands=True)
    assert Path("runs/own/model.pth").is_file()
    assert Path("out/predictions/0000.png").is_file()


def test_finetune(tutorials: Path) -> None:
    pytest.importorskip("omegaconf", reason="omegaconf is not installed")
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    run_tutorial(tutorials / "finetune.md", with_commands=True)
    for name in ("best.pth", "model.pth", "checkpoint_00000006.pth", "gallery.png"):
        assert Path("runs/shapes", name).is_file()
    assert {"PQ", "mask_AP"} <= json.loads(Path("figures.json").read_text())["summary"].keys()
    assert Path("out/4_overlay.png").is_file()


def test_ops(tutorials: Path) -> None:
    run_tutorial(tutorials / "ops.md", with_commands=False)


def test_every_tutorial_is_tested(tutorials: Path) -> None:
    assert {page.stem for page in tutorials.glob("*.md")} == {"finetune", "ops", "predict", "train"}

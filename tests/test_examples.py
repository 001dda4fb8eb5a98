"""Runs each example as a user would and checks its output."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.processes import environment, run
from support.repository import repository


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Path:
    return repository(monkeypatch) / "examples"


def run_example(script: Path, folder: Path, *options: str) -> str:
    """Runs a script in a directory and returns what it prints."""
    command = [sys.executable, script, *options, "--device", "cpu"]
    return run(command, cwd=folder, env=environment(OMP_NUM_THREADS="1")).stdout


def test_train_semantic_segmentation(examples: Path, tmp_path: Path) -> None:
    printed = run_example(examples / "train_semantic_segmentation.py", tmp_path, "--steps", "30")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    right = re.search(r"([\d.]+)% of the pixels of 16 unseen scenes are correct", printed)
    assert right is not None
    assert float(right[1]) > 50  # the most frequent label covers a third


def test_pool_and_merge(examples: Path, tmp_path: Path) -> None:
    printed = run_example(examples / "pool_and_merge.py", tmp_path, "--out", "map.png")
    assert len(re.findall(r"thing, score", printed)) == 7
    assert len(re.findall(r"stuff", printed)) == 3
    right = re.search(r"([\d.]+)% of the pixels have a segment", printed)
    assert right is not None
    assert float(right[1]) > 95
    image = np.asarray(Image.open(tmp_path / "map.png"))
    assert image.shape == (256, 768, 3)
    assert len(np.unique(image[:, 384:].reshape(-1, 3), axis=0)) == 11


def test_patch_torchvision(examples: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    printed = run_example(
        examples / "patch_torchvision.py", tmp_path, "--size", "96", "128", "--repeats", "1"
    )
    assert "torchvision.ops.boxes:nms uses ops.nms" in printed
    found = re.search(r"equal results for (\d+) detections", printed)
    assert found is not None
    assert int(found[1]) > 10

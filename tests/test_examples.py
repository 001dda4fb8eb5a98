"""Each example runs, as a user runs it, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from repository import repository


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Path:
    return repository(monkeypatch) / "examples"


def run(script: Path, folder: Path, *options: str) -> str:
    """Runs a script in a folder; returns what it prints."""
    result = subprocess.run(
        [sys.executable, script, *options, "--device", "cpu"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_train_semantic_segmentation(examples: Path, tmp_path: Path) -> None:
    printed = run(examples / "train_semantic_segmentation.py", tmp_path, "--steps", "30")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    right = re.search(r"([\d.]+)% of the pixels of 16 unseen scenes are right", printed)
    assert right is not None
    assert float(right[1]) > 50  # the most frequent label has a third


def test_pool_and_merge(examples: Path, tmp_path: Path) -> None:
    printed = run(examples / "pool_and_merge.py", tmp_path, "--out", "map.png")
    assert len(re.findall(r"thing, score", printed)) == 7
    assert len(re.findall(r"stuff", printed)) == 3
    right = re.search(r"([\d.]+)% of the pixels have a segment", printed)
    assert right is not None
    assert float(right[1]) > 95
    picture = np.asarray(Image.open(tmp_path / "map.png"))
    assert picture.shape == (256, 768, 3)
    assert len(np.unique(picture[:, 384:].reshape(-1, 3), axis=0)) == 11


def test_patch_torchvision(examples: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    printed = run(examples / "patch_torchvision.py", tmp_path, "--size", "96", "128", "--repeats", "1")
    assert "torchvision.ops.boxes:nms uses ops.nms" in printed
    found = re.search(r"the same (\d+) detections", printed)
    assert found is not None
    assert int(found[1]) > 10

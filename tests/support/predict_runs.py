"""Runs `panfpn-fast predict` with a stand-in for the network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import panfpn_fast
from panfpn_fast.cli.main import main
from panfpn_fast.data import get_categories
from panfpn_fast.inference import Instances

Loaded = dict[str, Any]


class OneDogModel(nn.Module):
    """Stands in for a network that finds one dog in every image, as large as the image."""

    def __init__(self, failure: Callable[[Sequence[Tensor]], None] = lambda images: None) -> None:
        super().__init__()
        self.config = SimpleNamespace(categories=get_categories("coco_panoptic"), score_threshold=0.05)
        self.failure = failure

    def forward(
        self, images: Sequence[Tensor], output_sizes: Sequence[tuple[int, int]], instances: str
    ) -> list[Any]:
        assert instances == "panoptic"  # nobody looks at the others
        self.failure(images)
        return [_one_dog(*size) for size in output_sizes]


def _one_dog(height: int, width: int) -> SimpleNamespace:
    segments = SimpleNamespace(
        id=torch.tensor([1]),
        isthing=torch.tensor([True]),
        label=torch.tensor([16]),
        score=torch.tensor([0.9]),
        area=torch.tensor([height * width]),
        instance=torch.tensor([0]),
    )
    found = Instances(
        torch.tensor([[0.0, 0.0, width, height]]),
        torch.tensor([0.9]),
        torch.tensor([16]),
        torch.ones(1, 28, 28),
    )
    everywhere = torch.ones(height, width, dtype=torch.int32)
    return SimpleNamespace(
        panoptic=everywhere, segments=segments, semantic=everywhere.to(torch.uint8) * 0, **vars(found)
    )


def replace_load(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """Replaces `panfpn_fast.load`, and records its arguments. Tests may set `model` to another network."""
    seen: Loaded = {"model": OneDogModel()}

    def load(weights: str, **overrides: Any) -> nn.Module:
        seen.update(weights=weights, overrides=overrides)
        model: nn.Module = seen["model"]
        return model

    monkeypatch.setattr(panfpn_fast, "load", load)
    return seen


def photo(path: Path, height: int = 40, width: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def predict(*arguments: str | Path, out: Path) -> int:
    return main(["predict", *map(str, arguments), "--out", str(out), "--device", "cpu", "--short-edge", "32"])


def written(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def read_annotations(out: Path) -> list[Any]:
    content: dict[str, list[Any]] = json.loads((out / "predictions.json").read_text())
    return content["annotations"]

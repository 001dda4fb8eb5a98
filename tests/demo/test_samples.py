from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import panfpn_fast
from panfpn_fast.checkpoints import hub
from panfpn_fast.demo.samples import WEIGHTS, predict_samples, samples


def test_the_shipped_network_finds_nuclei(tmp_path: Path) -> None:
    metrics = predict_samples(tmp_path, quiet=True)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["images"] == len(samples()) == 3
    assert metrics["things"] > 70
    assert metrics["stuff"] > 95
    for path in samples().image_folder.iterdir():
        with Image.open(path) as image, Image.open(tmp_path / f"{path.stem}_overlay.png") as overlay:
            assert image.size == overlay.size
    with Image.open(tmp_path / "gallery.png") as gallery:
        assert gallery.width == 3 * 384


def test_the_shipped_network_is_small_and_needs_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PANFPN_CACHE", str(tmp_path))
    path = hub.find(WEIGHTS)
    assert path.stat().st_size < 8 << 20
    model = panfpn_fast.load(WEIGHTS)
    assert [category.name for category in model.config.categories.all] == ["nucleus", "background"]
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_name() -> None:
    with pytest.raises(
        ValueError, match=r"unknown checkpoint 'builtin://nucleus'; similar names: builtin://nuclei"
    ):
        panfpn_fast.load("builtin://nucleus")

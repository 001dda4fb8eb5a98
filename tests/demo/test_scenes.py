from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from panfpn_fast.demo.scenes import train_on_scenes


def test_demo_writes_metrics_and_images(tmp_path: Path) -> None:
    metrics = train_on_scenes(tmp_path, steps=2, quiet=True)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics.keys() == {"PQ", "SQ", "RQ", "things", "stuff", "seconds"}
    with Image.open(tmp_path / "gallery.png") as gallery:
        assert gallery.size[0] == 3 * 2 * 192
    assert (tmp_path / "model.pth").exists()

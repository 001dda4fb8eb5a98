"""A tiny data set in COCO's panoptic format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 1, "name": "cell", "isthing": 1}, {"id": 2, "name": "glass", "isthing": 0}]


def write_coco(root: Path) -> dict[str, Any]:
    """Writes photos/1.png of a cell over glass, truth.json and truth/1.png; returns the content of the JSON."""
    for name in ("photos", "truth"):
        (root / name).mkdir()
    Image.new("RGB", (64, 48), (90, 120, 30)).save(root / "photos" / "1.png")
    colors = np.zeros((48, 64, 3), np.uint8)
    colors[:24, :, 0], colors[24:, :, 0] = 1, 2
    Image.fromarray(colors).save(root / "truth" / "1.png")
    segments = [{"id": i, "category_id": i, "area": 24 * 64, "iscrowd": 0} for i in (1, 2)]
    content = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
        "categories": CATEGORIES,
    }
    (root / "truth.json").write_text(json.dumps(content))
    return content

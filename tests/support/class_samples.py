"""Data sets in COCO's panoptic format with chosen classes, and settings of a run that trains on them in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from panfpn_fast.data.coco_ids import encode_panoptic

SMALL_RUN = [
    *("model.backbone=resnet10_narrow", "model.fpn_channels=16", "model.anchor_sizes=[8,16,32,64,128]"),
    *("model.box_head_channels=16", "model.mask_head_channels=8", "model.mask_head_convs=1"),
    *("model.semantic_channels=16", "model.semantic_groups=4", "model.stuff_area_threshold=10"),
    *("data.categories=''", "data.short_edges=[64]", "data.continuous_edges=false", "data.crop=[]"),
    *(
        "data.val_short_edge=64",
        "solver.steps=2",
        "solver.batch_size=2",
        "solver.warmup_steps=0",
        "workers=0",
    ),
]


def write_panoptic(root: Path, categories: list[dict[str, Any]], images: int = 3) -> tuple[Path, Path]:
    """Writes images of stripes and rectangles, one of each class; returns the image folder and the JSON.

    Things are rectangles on void or on stuff. Stuff is stripes, and void remains between them.

    Args:
        root: Folder to write to.
        categories: Entries of `categories` of the JSON; `color` may be absent.
        images: Number of images.
    """
    height, width = 48, 80
    (root / "images").mkdir(parents=True)
    (root / "truth").mkdir()
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for number in range(1, images + 1):
        random = np.random.default_rng(number)
        ids = np.zeros((height, width), np.int32)
        ordered = sorted(enumerate(categories, 1), key=lambda entry: entry[1]["isthing"])
        side = (width - 4) // max(1, len(ordered))
        for place, (id_, category) in enumerate(ordered):
            left = place * side
            if category["isthing"]:
                top = int(random.integers(0, height // 2))
                ids[top : top + 20, left : left + max(1, side - 2)] = id_
            else:
                ids[:, left : left + side] = id_
        colors = np.random.default_rng(0).integers(0, 256, (len(categories) + 1, 3))
        noise = random.integers(-20, 20, (height, width, 3))
        picture = (colors[ids] + noise).clip(0, 255).astype(np.uint8)
        name = f"{number:03}.png"
        Image.fromarray(picture).save(root / "images" / name)
        Image.fromarray(encode_panoptic(ids)).save(root / "truth" / name)
        content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        segments = [
            {"id": id_, "category_id": category["id"], "area": int((ids == id_).sum()), "iscrowd": 0}
            for id_, category in ordered
            if (ids == id_).any()
        ]
        content["annotations"].append({"image_id": number, "file_name": name, "segments_info": segments})
    (root / "truth.json").write_text(json.dumps(content))
    return root / "images", root / "truth.json"

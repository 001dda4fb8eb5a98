"""The same few annotated images in every format that the package reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from panfpn_fast.data.coco_ids import encode_panoptic

HEIGHT, WIDTH = 48, 64
CLASSES = ("box", "dot")
BACKGROUND_ID = 3


class Rectangle(NamedTuple):
    """An instance: its class, from 1, and its pixels x1 <= x < x2, y1 <= y < y2."""

    label: int
    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def polygon(self) -> list[int]:
        return [self.x1, self.y1, self.x2, self.y1, self.x2, self.y2, self.x1, self.y2]


# The last image of each split has no instance.
SCENES: dict[str, list[list[Rectangle]]] = {
    "train": [
        [Rectangle(1, 4, 6, 24, 30), Rectangle(2, 40, 10, 56, 26)],
        [Rectangle(2, 8, 20, 28, 40), Rectangle(2, 36, 2, 60, 22), Rectangle(1, 36, 26, 52, 46)],
        [],
    ],
    "val": [[Rectangle(1, 10, 10, 34, 34), Rectangle(2, 44, 8, 60, 24)], []],
}


def pixels(scene: list[Rectangle], seed: int) -> npt.NDArray[np.uint8]:
    """Returns an image of noise with rectangles in the color of their class."""
    image = np.random.default_rng(seed).integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for one in scene:
        image[one.y1 : one.y2, one.x1 : one.x2, one.label - 1] += 180
    return image


def ids(scene: list[Rectangle]) -> npt.NDArray[np.int32]:
    """Returns the map of instances, from 1."""
    found = np.zeros((HEIGHT, WIDTH), np.int32)
    for number, one in enumerate(scene, 1):
        found[one.y1 : one.y2, one.x1 : one.x2] = number
    return found


def save(path: Path, array: npt.NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def _write_images(folder: Path, scenes: list[list[Rectangle]]) -> None:
    for number, scene in enumerate(scenes):
        save(folder / f"{number}.png", pixels(scene, number))


def _images(scenes: list[list[Rectangle]]) -> list[dict[str, Any]]:
    return [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(len(scenes))]


def _coco_panoptic(root: Path, split: str) -> tuple[str, str]:
    scenes = SCENES[split]
    _write_images(root / split, scenes)
    annotations = []
    for number, scene in enumerate(scenes):
        found = np.where(ids(scene) == 0, 100, ids(scene))
        save(root / f"{split}_panoptic" / f"{number}.png", encode_panoptic(found))
        labels = {100: BACKGROUND_ID} | {i: one.label for i, one in enumerate(scene, 1)}
        segments = [
            {"id": id_, "category_id": label, "area": int((found == id_).sum()), "iscrowd": 0}
            for id_, label in labels.items()
        ]
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    names = [*CLASSES, "background"]
    categories = [{"id": i, "name": name, "isthing": int(i < 3)} for i, name in enumerate(names, 1)]
    content = {"images": _images(scenes), "annotations": annotations, "categories": categories}
    (root / f"{split}_panoptic.json").write_text(json.dumps(content))
    return str(root / split), str(root / f"{split}_panoptic.json")


def _coco_instances(root: Path, split: str) -> tuple[str, str]:
    from pycocotools import mask

    scenes = SCENES[split]
    _write_images(root / split, scenes)
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        for place, one in enumerate(scene):
            bitmap = np.asfortranarray(ids([one]), np.uint8)
            compressed = mask.encode(bitmap)
            flat = bitmap.ravel(order="F")
            ends = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
            segmentation = (
                [one.polygon],
                {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()},
                {"size": [HEIGHT, WIDTH], "counts": np.diff(ends).tolist()},
            )[place]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": one.label,
                    "segmentation": segmentation,
                    "area": int(bitmap.sum()),
                    "bbox": [one.x1, one.y1, one.x2 - one.x1, one.y2 - one.y1],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name, "supercategory": "thing"} for i, name in enumerate(CLASSES, 1)]
    content = {"images": _images(scenes), "annotations": annotations, "categories": categories}
    (root / f"instances_{split}.json").write_text(json.dumps(content))
    return str(root / split), str(root / f"instances_{split}.json")


def _yolo(root: Path, split: str) -> tuple[str, str]:
    scenes = SCENES[split]
    _write_images(root / "images" / split, scenes)
    (root / "labels" / split).mkdir(parents=True)
    for number, scene in enumerate(scenes):
        lines = [
            " ".join(
                [str(one.label), *(repr(v / (HEIGHT if i % 2 else WIDTH)) for i, v in enumerate(one.polygon))]
            )
            for one in scene
        ]
        if lines:  # an image without objects has no file
            (root / "labels" / split / f"{number}.txt").write_text("\n".join(lines))
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES, 1))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return split, str(root / "data.yaml")


def _labelme(root: Path, split: str) -> tuple[str, str]:
    scenes = SCENES[split]
    _write_images(root / split, scenes)
    for number, scene in enumerate(scenes):
        shapes: list[dict[str, Any]] = [
            {
                "label": CLASSES[one.label - 1],
                "points": [[one.x1, one.y1], [one.x2, one.y2]]
                if place % 2
                else np.reshape(one.polygon, (4, 2)).tolist(),
                "group_id": None,
                "shape_type": "rectangle" if place % 2 else "polygon",
                "flags": {},
            }
            for place, one in enumerate(scene)
        ]
        content: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"..\\pictures\\{number}.png",
            "imageData": None,
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
        }
        (root / split / f"{number}.json").write_text(json.dumps(content))
    return str(root / split), str(root / split)


def _masks(root: Path, split: str) -> tuple[str, str]:
    scenes = SCENES[split]
    _write_images(root / split, scenes)
    for number, scene in enumerate(scenes):
        labels = np.array([0, *(1000 * one.label + i for i, one in enumerate(scene))], np.uint16)
        save(root / f"{split}_masks" / f"{number}.png", labels[ids(scene)])
    return str(root / split), str(root / f"{split}_masks")


WRITERS: dict[str, Callable[[Path, str], tuple[str, str]]] = {
    "coco_panoptic": _coco_panoptic,
    "coco_instances": _coco_instances,
    "yolo": _yolo,
    "labelme": _labelme,
    "masks": _masks,
}
"""Each writes a split to a folder and returns the settings `images` and `annotations`."""

RULES: dict[str, dict[str, Any]] = {"masks": {"classes": CLASSES, "label_divisor": 1000}}
"""The fields of `ReadingRules` that a format needs."""

"""Each defect of annotations ends in one message that names the file, the place, and what was expected."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from panfpn_fast.data import DataError, ReadingRules, open_dataset
from support.annotated_folders import HEIGHT, RULES, WIDTH, WRITERS

pytest.importorskip("pycocotools")
pytest.importorskip("yaml")

Change = Callable[[dict[str, Any]], object]


def edited(name: str, change: Change) -> Callable[[Path], None]:
    """Returns a function that changes the content of a JSON file."""

    def edit(root: Path) -> None:
        content = json.loads((root / name).read_text())
        change(content)
        (root / name).write_text(json.dumps(content))

    return edit


def written(name: str, text: str) -> Callable[[Path], object]:
    """Returns a function that replaces a text file."""
    return lambda root: (root / name).write_text(text)


def panoptic(change: Change) -> Callable[[Path], None]:
    return edited("train_panoptic.json", change)


def instances(change: Change) -> Callable[[Path], None]:
    return edited("instances_train.json", change)


def labelme(change: Change, number: int = 1) -> Callable[[Path], None]:
    return edited(f"train/{number}.json", change)


def no_json(root: Path) -> None:
    for path in root.rglob("*.json"):
        path.unlink()


def mask(array: Any) -> Callable[[Path], None]:
    """Returns a function that replaces the mask of the second image by a TIFF."""

    def write(root: Path) -> None:
        (root / "train_masks" / "1.png").unlink()
        Image.fromarray(array).save(root / "train_masks" / "1.tif")

    return write


NAMES = "data.yaml: names: expected names of classes, in a list or by number, got "
STUFF: list[dict[str, Any]] = [{"id": i, "name": str(i), "isthing": 0} for i in range(4096)]

# A kind of data, what is done to its files, and the message; ROOT is the folder of the files.
CASES: list[tuple[str, Callable[[Path], object], str]] = [
    *(
        ("yolo", written("data.yaml", f"train: images/train\n{names}"), f"{NAMES}{got}")
        for names, got in (
            ("names: []", "[]"),
            ("names: [box, 2]", "['box', 2]"),
            ("names: [box, '']", "['box', '']"),
            ("names: {a: box}", "{'a': 'box'}"),
            ("names: {-1: box}", "{-1: 'box'}"),
            ("names: {true: box}", "{True: 'box'}"),
        )
    ),
    *(
        ("yolo", written("data.yaml", f"names: [none, box, dot]\n{train}"), f"data.yaml: {message}")
        for train, message in (
            ("nc: '3'", "nc: expected an integer in 0..100000, got '3'"),
            ("", "lacks 'train'"),
            ("train: [3]", "train: expected a path or a list of paths, got [3]"),
            ("train: ''", "train: expected a path or a list of paths, got ''"),
            ("train: []", "no images in train"),
            ("train: labels", "no images in ROOT/labels"),
        )
    ),
    ("yolo", written("data.yaml", "names: [box]\ntrain: data.yaml"), "data.yaml: expected names of images, got 'names"),
    ("yolo", lambda root: (root / "labels/train/1.txt").write_bytes(b"\xff"),
     "labels/train/1.txt: cannot be read as text"),
    *(
        ("labelme", labelme(change), f"train/1.json: {message}")
        for change, message in (
            (lambda content: content.update(imagePath="/"), "imagePath: expected the path of an image, got '/'"),
            (lambda content: content.update(imageWidth=65),
             "imageWidth: expected 64, the size of ROOT/train/1.png, got 65"),
            (lambda content: content.update(imageHeight=0), "imageHeight: expected an integer in 1..2147483647, got 0"),
            (lambda content: content.update(shapes={}), "shapes: expected a list, got {}"),
            (lambda content: content["shapes"].insert(0, 3), "shapes[0]: expected an object, got 3"),
            (lambda content: content["shapes"][0].update(points=None), "shapes[0].points: expected a list, got None"),
        )
    ),
    ("labelme", no_json, "train: no JSON file in this folder"),
    ("labelme", lambda root: [labelme(lambda content: content.update(shapes=[]), i)(root) for i in range(3)],
     "train: expected at least one class, found none"),
    ("masks", mask(np.full((HEIGHT, WIDTH), -5, np.int32)),
     "train_masks/1.tif: expected values of at least 0, got -5..-5"),
    ("masks", mask(np.zeros((HEIGHT, WIDTH, 3), np.uint8)),
     "train_masks/1.tif: expected gray pixels of 8 or 16 bits, got "),
    ("masks", mask(np.zeros((HEIGHT, 9), np.uint8)),
     "train_masks/1.tif: expected 64 x 48 pixels, the size of ROOT/train/1.png"),
    ("masks", mask(np.full((HEIGHT, WIDTH), 3001, np.uint16)),
     "train_masks/1.tif: the value 3001 has the class 3, which is not among the classes; list it in "
     "classes, or the value in void_values"),
    *(
        ("coco_instances", instances(change), f"instances_train.json: {message}")
        for change, message in (
            (lambda content: content.pop("images"), "expected COCO's instances format, with a list 'images'"),
            (lambda content: content["images"][1].update(id=0), "images[1].id: expected a unique id, got 0"),
            (lambda content: content["images"][1].update(width=9),
             "images[1]: expected the size of ROOT/train/1.png, 64 x 48 pixels, got 9 x 48"),
            (lambda content: content["categories"][1].update(id=1), "categories[1].id: expected a unique id, got 1"),
            (lambda content: content["categories"][1].update(color=[0, 0, 256]),
             "categories[1].color: expected three integers in 0..255, got [0, 0, 256]"),
            (lambda content: content["categories"][1].update(isthing=2),
             "categories[1].isthing: expected 0 or 1, got 2"),
            (lambda content: content["categories"].clear(), "expected at least one class, found none"),
            (lambda content: content["categories"].extend({**row, "id": row["id"] + 3} for row in STUFF),
             "stuff: expected at most 4095 classes, got 4097"),
        )
    ),
    *(
        ("coco_panoptic", panoptic(change), f"train_panoptic.json: {message}")
        for change, message in (
            (lambda content: content.pop("annotations"),
             "expected COCO's panoptic format, an object with a list 'annotations'"),
            (lambda content: content.pop("images"), "expected a list 'images'"),
            (lambda content: content.pop("categories"),
             "expected a list 'categories'; without it, pass the classes as `categories`"),
            (lambda content: content["annotations"][1].update(image_id=0),
             "annotations[1].image_id: expected an image without another annotation (annotations[0]), got 0"),
            (lambda content: content["images"][1].update(id=0),
             "images[1].id: expected a unique id, but it is also that of '0.png', got 0"),
            (lambda content: content["images"].pop(1), "annotations[1].image_id: 'images' lacks the image 1"),
            (lambda content: content["categories"].clear(),
             "'categories' is empty; name the data set whose classes it has"),
            (lambda content: content["categories"].extend({**row, "id": row["id"] + 4} for row in STUFF),
             "categories: stuff: expected at most 4095 classes, got 4097"),
            (lambda content: content["annotations"][1]["segments_info"][1].update(id=100),
             "annotations[1].segments_info[1] (image 1).id: expected a unique id, got 100"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "damage", "message"), CASES, ids=[f"{kind}: {text[:60]}" for kind, _, text in CASES]
)
def test_the_defect_is_named(
    kind: str, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    where = WRITERS[kind](tmp_path, "train")
    damage(tmp_path)
    with pytest.raises(DataError) as caught:
        open_dataset(kind, *where, rules=ReadingRules(**RULES.get(kind, {}))).load(1)
    assert str(caught.value).startswith(f"{tmp_path}/{message.replace('ROOT', str(tmp_path))}")


def test_a_label_that_is_new_when_a_file_is_read(tmp_path: Path) -> None:
    dataset = open_dataset("labelme", *WRITERS["labelme"](tmp_path, "train"))
    labelme(lambda content: content["shapes"][0].update(label="ring"))(tmp_path)
    with pytest.raises(
        DataError, match=r"1\.json: shapes\[0\]\.label: expected one of the classes, got 'ring'"
    ):
        dataset.load(1)


@pytest.mark.parametrize(
    ("kind", "module", "file", "remedy"),
    [
        ("yolo", "yaml", "data.yaml", "It needs PyYAML: pip install pyyaml"),
        *(
            (kind, "pycocotools.mask", file, "Its polygons need pycocotools: pip install pycocotools")
            for kind, file in (
                ("yolo", "data.yaml"),
                ("labelme", "train"),
                ("coco_instances", "instances_train.json"),
            )
        ),
    ],
)
def test_a_missing_package_is_named(
    kind: str, module: str, file: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = WRITERS[kind](tmp_path, "train")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as caught:
        open_dataset(kind, *where)
    assert str(caught.value).startswith(f"{tmp_path / file}: ")
    assert str(caught.value).endswith(remedy)

"""Defects of COCO files are named in an error, or the images are skipped and counted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from panfpn_fast.cli.main import main
from panfpn_fast.data.categories import Categories, Category, class_list
from panfpn_fast.data.class_check import ClassMismatchError
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.data.files import DataError, read_label_map, read_segment_ids
from panfpn_fast.data.loader import TrainLoader
from panfpn_fast.data.transforms import Compose
from panfpn_fast.inference import encode_panoptic

IDS = np.array([[5, 5, 300, 300], [5, 5, 300, 0], [5, 70_000, 70_000, 0]])
CATEGORIES: list[dict[str, Any]] = [
    {"id": 1, "name": "cell", "isthing": 1, "color": [1, 2, 3]},
    {"id": 2, "name": "glass", "isthing": 0, "color": [4, 5, 6]},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three annotated images; the tests damage the second one."""
    images, annotations = [], []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        for folder, picture in (("images", pixels), ("truth", encode_panoptic(IDS))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(picture).save(tmp_path / folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        segments = [
            {"id": id_, "category_id": category, "area": int(np.count_nonzero(id_ == IDS)), "iscrowd": 0}
            for id_, category in ((5, 2), (300, 1), (70_000, 1))
        ]
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return tmp_path


def open_it(root: Path) -> CocoPanopticDataset:
    return CocoPanopticDataset(root / "images", root / "truth.json")


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the second annotation in the JSON."""
    content = json.loads((root / "truth.json").read_text())
    change(content["annotations"][1])
    (root / "truth.json").write_text(json.dumps(content))


def halve(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def shrink(path: Path) -> None:
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing image": (lambda root: (root / "images/1.png").unlink(), "images/1.png: no such file"),
    "missing PNG": (lambda root: (root / "truth/1.png").unlink(), "truth/1.png: no such file"),
    "truncated image": (lambda root: halve(root / "images/1.png"), "images/1.png: cannot be decoded: "),
    "truncated PNG": (lambda root: halve(root / "truth/1.png"), "truth/1.png: cannot be decoded: "),
    "another size": (
        lambda root: shrink(root / "truth/1.png"),
        "truth/1.png: expected 4 x 3 pixels, the size of ",
    ),
    "unknown category": (
        lambda root: edit(root, lambda entry: entry["segments_info"][2].update(category_id=77)),
        "truth.json: segment 70000 of image 1 has the unknown category 77",
    ),
    "segment only in the PNG": (
        lambda root: edit(root, lambda entry: entry["segments_info"].pop(1)),
        "truth/1.png: segment 300 is missing from segments_info in the JSON",
    ),
    "segment only in the JSON": (
        lambda root: edit(root, lambda entry: entry["segments_info"][0].update(id=6)),
        "truth/1.png: segment 5 is missing from segments_info in the JSON",
    ),
    "segment without a pixel": (
        lambda root: edit(
            root, lambda entry: entry["segments_info"].append({"id": 9, "category_id": 1, "area": 1})
        ),
        "truth/1.png: segment 9 of segments_info in the JSON has no pixels",
    ),
    "area below the number of pixels": (
        lambda root: edit(root, lambda entry: entry["segments_info"][1].update(area=2.5)),
        "truth.json: image 1: segment 300 has the area 2.5 in the JSON, but 3 pixels in the map; count the areas anew",
    ),
    "segment without its area": (
        lambda root: edit(root, lambda entry: entry["segments_info"][0].pop("area")),
        "truth.json: annotations[1].segments_info[0] (image 1) lacks 'area'",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_named_or_skipped_and_counted(root: Path, kind: str, workers: int) -> None:
    damage, message = DAMAGE[kind]
    damage(root)
    named = f"^{re.escape(f'{root}/{message}')}"
    dataset = open_it(root)
    with pytest.raises(DataError, match=named):
        dataset.load(1)
    with pytest.raises(DataError, match=named):
        list(islice(TrainLoader(dataset, Compose([]), 1, workers=workers), 3))
    loader = TrainLoader(dataset, Compose([]), 3, workers=workers, skip_bad=True)
    with pytest.warns(UserWarning, match="skipped "):
        batches = list(islice(loader, 4))
    assert all(len(batch.images) == 3 for batch in batches)
    assert [bool(re.match(named, skipped)) for skipped in loader.skipped] == [True]


def test_whole_files_load(root: Path) -> None:
    sample = open_it(root).load(1)
    assert sample.segments.tolist() == [[1, 1, 2, 2], [1, 1, 2, 0], [1, 3, 3, 0]]
    assert sample.isthing.tolist() == [False, True, True]
    assert sample.label.tolist() == [1, 0, 0]
    assert sample.area.tolist() == [5, 3, 2]


@pytest.mark.parametrize("key", ["image_id", "file_name", "segments_info"])
def test_annotations_that_lack_a_part(root: Path, key: str) -> None:
    edit(root, lambda entry: entry.pop(key))
    with pytest.raises(DataError, match=rf"truth.json: annotations\[1\] lacks '{key}'"):
        open_it(root)


def test_classes_that_contradict_the_json(root: Path) -> None:
    """Given classes must agree with the classes that the file lists."""
    path = root / "truth.json"
    cell, glass = (Category(c["id"], c["name"], bool(c["isthing"]), (0, 0, 0)) for c in CATEGORIES)
    more = Category(3, "crack", True, (0, 0, 0))
    given = Categories("mine", (cell, more), (glass,))
    assert CocoPanopticDataset(root / "images", path, categories=given).categories is given
    for wrong, message in (
        (
            Categories("mine", (cell._replace(name="crack"),), (glass,)),
            "1 is 'cell' (thing), but 'crack' (thing)",
        ),
        (
            Categories("mine", (cell, glass._replace(isthing=True)), ()),
            "2 is 'glass' (stuff), but 'glass' (thing)",
        ),
        (
            Categories("mine", (cell,), (more._replace(isthing=False),)),
            "2 is 'glass', an id that the given classes (mine) lack",
        ),
    ):
        with pytest.raises(
            ClassMismatchError, match=f"^{re.escape(f'{path}: category {message}')}"
        ) as caught:
            CocoPanopticDataset(root / "images", path, categories=wrong)
        assert f" File: 1 cell, 2 glass. Given: {class_list(wrong.all)}" in str(caught.value)
    with pytest.raises(ValueError, match=r"categories: expected a Categories object or one of .*got 'coco'"):
        CocoPanopticDataset(root / "images", path, categories="coco")
    content = json.loads(path.read_text())
    content["categories"][1]["id"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"truth.json: categories\[1\]\.id: expected a unique id, got 1"):
        open_it(root)
    del content["categories"]
    path.write_text(json.dumps(content))
    assert CocoPanopticDataset(root / "images", path, categories=given).categories is given
    with pytest.raises(DataError, match=r"truth.json: expected a list 'categories'"):
        open_it(root)


def test_a_file_truncated_at_any_byte_is_read_or_named(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    for name, picture, read in (
        ("c.png", colours, read_segment_ids),
        ("g.png", colours[..., 0].astype(np.uint16), read_label_map),
    ):
        path = tmp_path / name
        Image.fromarray(picture).save(path)
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            try:
                found = read(path)
            except DataError as error:
                assert str(error).startswith(f"{path}: cannot be decoded: ")  # noqa: PT017
            else:
                np.testing.assert_array_equal(found, picture)


def test_the_command_names_it_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("omegaconf")
    (root / "truth" / "1.png").unlink()
    settings = [
        "data.kind=coco_panoptic",
        f"data.images={root}/images",
        f"data.annotations={root}/truth.json",
    ]
    settings += ["data.categories=''", "solver.steps=3", "solver.batch_size=1", "workers=1"]
    arguments = ["train", "--preset", "tiny", "--device", "cpu", "--out", str(root / "out")]
    assert main([*arguments, *settings]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"panfpn-fast: {root}/truth/1.png: no such file"

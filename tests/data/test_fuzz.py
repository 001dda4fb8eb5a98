"""Annotations that users damage in any way are read, or refused in an error that names the file."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from panfpn_fast.data.categories import Categories, Category
from panfpn_fast.data.cityscapes import CityscapesDataset
from panfpn_fast.data.coco_ids import encode_panoptic
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.data.files import DataError
from panfpn_fast.data.images import read_image
from panfpn_fast.data.panoptic_json import PanopticJson
from support.damage import VALUES, bounded, change, places, write_image

IDS = np.array([[5, 5, 300, 300], [5, 5, 300, 0], [5, 70_000, 70_000, 0]])
LABELS = np.array([[7, 7, 26_000, 26_000], [7, 7, 26_001, 0], [7, 8, 8, 0]], np.uint16)
CONTENT: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [
        {
            "image_id": id_,
            "file_name": name,
            "segments_info": [
                {"id": 5, "category_id": 2, "area": 5, "iscrowd": 0},
                {"id": 300, "category_id": 1, "area": 3, "iscrowd": 1},
                {"id": 70_000, "category_id": 1, "area": 2},
            ],
        }
        for id_, name in ((1, "a.png"), (2, "b.png"))
    ],
    "categories": [
        {"id": 1, "name": "cell", "isthing": 1, "color": [1, 2, 3]},
        {"id": 2, "name": "glass", "isthing": 0},
    ],
}
GIVEN = Categories("mine", (Category(1, "cell", True, (1, 2, 3)),), (Category(2, "glass", False, (4, 5, 6)),))
MODES = ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]
FORMATS = ["PNG", "TIFF", "JPEG", "BMP", "GIF"]
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images in COCO's panoptic format, and one in that of Cityscapes."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "images" / name, pixels)
        write_image(tmp_path / "truth" / name, encode_panoptic(IDS))
    (tmp_path / "truth.json").write_text(json.dumps(CONTENT))
    write_image(tmp_path / "leftImg8bit/val/bonn/bonn_1_leftImg8bit.png", pixels)
    write_image(tmp_path / "gtFine/val/bonn/bonn_1_gtFine_instanceIds.png", LABELS)
    return tmp_path


def coco(root: Path) -> None:
    for categories in (None, GIVEN):
        dataset = CocoPanopticDataset(root / "images", root / "truth.json", categories=categories)
        for index in range(len(dataset)):
            dataset.load(index)


def read_or_named(root: Path, name: str = "/") -> None:
    """Reads both data sets and the table of an evaluation; an error must start with a path that contains `name`."""

    def cityscapes(root: Path) -> None:
        CityscapesDataset(root, "val").load(0)

    def evaluation(root: Path) -> None:
        truth = PanopticJson(root / "truth.json")
        kinds = truth.kinds()
        for annotation in truth.annotations:
            truth.segments(annotation, kinds, predicted=True)

    messages = []
    for read in (coco, cityscapes, evaluation):
        try:
            read(root)
        except DataError as error:  # anything else fails the test
            messages.append(str(error))
    for message in messages:
        path, _, defect = message.partition(": ")
        assert path.startswith("/"), message
        assert name in path, message
        assert defect, message


@bounded
@given(data=st.data())
def test_any_change_of_the_json(root: Path, data: st.DataObject) -> None:
    content = copy.deepcopy(CONTENT)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(places(content))))
        kind = data.draw(st.sampled_from(["drop", "replace", "duplicate"]))
        content = change(content, path, kind, data.draw(st.sampled_from(VALUES)))
    (root / "truth.json").write_text(json.dumps(content))
    read_or_named(root)


@bounded
@given(data=st.data())
def test_any_bytes_of_the_json(root: Path, data: st.DataObject) -> None:
    whole = json.dumps(CONTENT, indent=1).encode(data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])))
    start = data.draw(st.integers(0, len(whole)))
    new = data.draw(st.binary(max_size=4))
    end = len(whole) if data.draw(st.booleans()) else start + len(new)
    (root / "truth.json").write_bytes(whole[:start] + new + whole[end:])
    read_or_named(root)


@bounded
@given(data=st.data())
def test_any_change_of_an_image(root: Path, data: st.DataObject) -> None:
    path = root / data.draw(
        st.sampled_from(
            [
                "images/a.png",
                "truth/a.png",
                "leftImg8bit/val/bonn/bonn_1_leftImg8bit.png",
                "gtFine/val/bonn/bonn_1_gtFine_instanceIds.png",
            ]
        )
    )
    original = path.read_bytes()
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
        buffer = io.BytesIO()
        kind = data.draw(st.sampled_from(FORMATS))
        mode = data.draw(st.sampled_from(MODES))
        converted = pixels.convert("L").convert(mode) if mode in ("I;16", "I", "F") else pixels.convert(mode)
        try:
            converted.save(buffer, format=kind)
        except (OSError, ValueError, KeyError):  # a format cannot hold every mode
            buffer = io.BytesIO(original)
        whole = buffer.getvalue()
        start = data.draw(st.integers(0, len(whole)))
        damage = data.draw(st.sampled_from(["none", "truncate", "overwrite"]))
        if damage == "truncate":
            whole = whole[:start]
        elif damage == "overwrite" and kind == "PNG":  # its checksums prevent sizes that fill the memory
            whole = whole[:start] + data.draw(st.binary(min_size=1, max_size=3)) + whole[start + 1 :]
        path.write_bytes(whole)
        read_or_named(root, path.name)
    finally:
        path.write_bytes(original)


def test_the_json_is_utf8_whatever_the_locale(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = copy.deepcopy(CONTENT)
    content["categories"][0]["name"] = "Zelle größer"
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    for encoding in ("utf-8", "utf-8-sig"):
        (root / "truth.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
        names = [c.name for c in CocoPanopticDataset(root / "images", root / "truth.json").categories.all]
        assert names == ["Zelle größer", "glass"]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("P", "palette"), ("L", "gray"), ("1", "1-bit"), ("I;16", "16-bit gray")],
)
def test_panoptic_pngs_of_other_modes_are_named(root: Path, mode: str, kind: str) -> None:
    with Image.open(root / "truth" / "a.png") as image:
        gray = image.convert("L")
    (gray if mode == "I;16" else image.convert(mode)).convert(mode).save(root / "truth" / "a.png")
    with pytest.raises(DataError, match=rf"a\.png: expected 8-bit RGB pixels.*got {kind}"):
        CocoPanopticDataset(root / "images", root / "truth.json").load(0)


def test_huge_images_are_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    write_image(tmp_path / "huge.png", np.zeros((7, 7, 3), np.uint8))
    with pytest.raises(DataError, match=r"huge\.png: has more than 20 pixels.*PANFPN_MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "huge.png")
    for wrong in ("-1", "0", "many"):
        monkeypatch.setenv("PANFPN_MAX_IMAGE_PIXELS", wrong)
        with pytest.raises(
            DataError, match=f"PANFPN_MAX_IMAGE_PIXELS: expected a positive number.*'{wrong}'"
        ):
            read_image(tmp_path / "huge.png")
    monkeypatch.setenv("PANFPN_MAX_IMAGE_PIXELS", "49")
    assert read_image(tmp_path / "huge.png").shape == (7, 7, 3)

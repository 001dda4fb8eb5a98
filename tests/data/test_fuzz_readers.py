"""Every reader of annotations reads damaged files, or refuses them in an error that names the file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from panfpn_fast.data import DataError, ReadingRules, open_dataset
from support.annotated_folders import HEIGHT, RULES, WIDTH, WRITERS
from support.damage import VALUES, bounded, change, places

pytest.importorskip("pycocotools")
yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged files

# Values that are plausible in a mask or a polygon, and numbers that fill the memory if they are believed.
MORE = [
    *VALUES,
    [[0, 0, 5, 0, 5, 5]],
    [[1, 1], [1, 1]],
    "0" * 40,
    "PPPP0",
    "o" * 9 + "0",
    [3072],
    [-1, 3073],
    [0] * 99,
]
MORE += [
    {"size": [HEIGHT, WIDTH], "counts": counts} for counts in ("", "P", "0", [1], [HEIGHT * WIDTH], None)
]
MORE += [
    {"size": [2**30, 2**30], "counts": "0"},
    1e300,
    -(2**40),
    "circle",
    "mask",
    "rectangle",
    "../images",
    "/",
]

Root = tuple[Path, tuple[str, str]]


@pytest.fixture
def root(kind: str, tmp_path: Path) -> Root:
    return tmp_path, WRITERS[kind](tmp_path, "train")


def read_or_named(kind: str, root: Root) -> None:
    """Reads a data set with its own and with given classes; an error must start with a path."""
    messages = []
    for categories in (None, "coco_panoptic"):
        try:
            dataset = open_dataset(kind, *root[1], categories, ReadingRules(**RULES.get(kind, {})))
            for index in range(len(dataset)):
                dataset.load(index)
        except DataError as error:  # anything else fails the test
            messages.append(str(error))
    for message in messages:
        path, _, defect = message.partition(": ")
        assert path.startswith(str(root[0])), message
        assert defect, message
        assert len(message) < len(str(root[0])) * 3 + 500


# The file that is damaged, and the function that reads it.
FILES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "coco_instances": ("instances_train.json", json.loads),
    "labelme": ("train/0.json", json.loads),
    "yolo": ("data.yaml", yaml.safe_load),
}


@pytest.mark.parametrize("kind", FILES)
@bounded
@given(data=st.data())
def test_any_change_of_a_field(kind: str, root: Root, data: st.DataObject) -> None:
    name, read = FILES[kind]
    path = root[0] / name
    original = path.read_bytes()
    try:
        content = read(original.decode())
        for _ in range(data.draw(st.integers(1, 2))):
            place = data.draw(st.sampled_from(list(places(content))))
            how = data.draw(st.sampled_from(["drop", "replace", "duplicate"]))
            content = change(content, place, how, data.draw(st.sampled_from(MORE)))
        path.write_text(json.dumps(content))  # almost all JSON is YAML
        read_or_named(kind, root)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("kind", [*FILES, "masks"])
@bounded
@given(data=st.data())
def test_any_bytes(kind: str, root: Root, data: st.DataObject) -> None:
    names = {"yolo": ["data.yaml", "labels/train/1.txt"], "masks": ["train_masks/1.png"]}
    path = root[0] / data.draw(st.sampled_from(names.get(kind) or [FILES[kind][0]]))
    original = path.read_bytes()
    try:
        start = data.draw(st.integers(0, len(original)))
        new = data.draw(st.binary(max_size=4))
        end = len(original) if data.draw(st.booleans()) else start + len(new)
        path.write_bytes(original[:start] + new + original[end:])
        read_or_named(kind, root)
    finally:
        path.write_bytes(original)


WORDS = st.sampled_from(
    ["0", "1", "2", "-1", "0.5", "1e9", "nan", "inf", "-0.2", "1.7", "x", "\0", "\u0661", "1_0", ""]
)


@bounded
@given(lines=st.lists(st.lists(WORDS, max_size=9), max_size=3))
def test_any_words_of_yolo_labels(tmp_path_factory: pytest.TempPathFactory, lines: list[list[str]]) -> None:
    folder = tmp_path_factory.mktemp("yolo")
    where = WRITERS["yolo"](folder, "train")
    (folder / "labels" / "train" / "0.txt").write_text("\n".join(" ".join(line) for line in lines))
    read_or_named("yolo", (folder, where))


@bounded
@given(data=st.data())
def test_any_kind_of_mask(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("masks")
    where = WRITERS["masks"](folder, "train")
    mode = data.draw(st.sampled_from(["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]))
    values = np.full((HEIGHT, WIDTH), data.draw(st.sampled_from([0, 1, 2, 200])), np.uint8)
    buffer = io.BytesIO()
    suffix = data.draw(st.sampled_from(["PNG", "TIFF", "BMP", "JPEG"]))
    try:
        image = Image.fromarray(values)
        (image if mode == "L" else image.convert(mode)).save(buffer, suffix)
    except (OSError, ValueError, KeyError):  # a format cannot hold every mode
        return
    (folder / "train_masks" / "0.png").write_bytes(buffer.getvalue())
    read_or_named("masks", (folder, where))


def test_yaml_that_repeats_itself(tmp_path: Path) -> None:
    """The text of such a value would fill the memory."""
    where = WRITERS["yolo"](tmp_path, "train")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (tmp_path / "data.yaml").write_text("\n".join([*lines, "names: *a29", "train: images/train"]))
    with pytest.raises(DataError, match=r"data\.yaml: names: expected names of classes"):
        open_dataset("yolo", *where)

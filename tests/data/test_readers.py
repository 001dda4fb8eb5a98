"""All readers give the same samples for the same images, and name what is wrong."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from panfpn_fast.data import (
    Categories,
    CocoInstancesDataset,
    DataError,
    IdMasksDataset,
    LabelMeDataset,
    ReadingRules,
    Sample,
    YoloDataset,
    get_categories,
    open_dataset,
    read_categories,
)
from panfpn_fast.data.class_check import ClassMismatchError
from panfpn_fast.data.polygons import bitmap_rle, polygons_rle
from panfpn_fast.data.regions import Painter, Region
from panfpn_fast.data.survey import survey
from support.annotated_folders import (
    BACKGROUND_ID,
    CLASSES,
    HEIGHT,
    RULES,
    SCENES,
    WIDTH,
    WRITERS,
    ids,
    pixels,
    save,
)

pytest.importorskip("pycocotools")
pytest.importorskip("yaml")


def rules(kind: str, **more: Any) -> ReadingRules:
    return ReadingRules(**RULES.get(kind, {}), **more)


def names_and_masks(sample: Sample, categories: Categories) -> list[tuple[str, bool, list[list[bool]]]]:
    """Returns the classes and pixels of the segments, in an order that the format does not change."""
    rows = zip(sample.isthing.tolist(), sample.label.tolist(), strict=True)
    return sorted(
        (
            (categories.things[label] if isthing else categories.stuff[label - 1]).name,
            isthing,
            (sample.segments == row).tolist(),
        )
        for row, (isthing, label) in enumerate(rows, 1)
    )


# COCO's panoptic format states the class of each pixel.
@pytest.mark.parametrize(
    ("kind", "background"),
    [(kind, "stuff") for kind in WRITERS] + [(kind, "void") for kind in WRITERS if kind != "coco_panoptic"],
)
def test_the_same_images_in_every_format(kind: str, background: str, tmp_path: Path) -> None:
    where = WRITERS[kind](tmp_path, "train")
    dataset = open_dataset(kind, *where, rules=rules(kind, background=background))
    stuff = ["background"] if background == "stuff" else []
    assert [c.name for c in dataset.categories.things] == list(CLASSES)
    assert [c.name for c in dataset.categories.stuff] == stuff
    assert [c.id for c in dataset.categories.all] == [1, 2, 3][: 2 + len(stuff)]
    assert len({c.color for c in dataset.categories.all}) == 2 + len(stuff)
    assert len(dataset) == len(SCENES["train"])
    for index, scene in enumerate(SCENES["train"]):
        sample = dataset.load(index)
        assert torch.equal(sample.image, torch.from_numpy(pixels(scene, index)).permute(2, 0, 1))
        found = ids(scene)
        expected = [(CLASSES[one.label - 1], True, (found == i).tolist()) for i, one in enumerate(scene, 1)]
        expected += [(name, False, (found == 0).tolist()) for name in stuff]
        assert names_and_masks(sample, dataset.categories) == sorted(expected)
        counts = torch.bincount(sample.segments.flatten(), minlength=len(sample.label) + 1)[1:]
        assert sample.area.tolist() == counts.tolist()
        assert not sample.crowd.any()
        assert sample.file_name.endswith(f"{index}.png")


@pytest.mark.parametrize("kind", WRITERS)
def test_given_classes(kind: str, tmp_path: Path) -> None:
    """The data of an evaluation have the classes of the network, also if they lack some, or are in another order."""
    where = WRITERS[kind](tmp_path, "val")
    own = open_dataset(kind, *where, rules=rules(kind)).categories
    ring = own.things[1]._replace(id=9, name="ring")
    given = Categories("mine", (*own.things, ring), own.stuff)
    dataset = open_dataset(kind, *where, given, rules(kind))
    assert dataset.categories is given
    assert len(dataset.load(0).label) == 3
    other = Categories("mine", (own.things[0], ring), own.stuff)
    lists = r"'dot'.*\. (File|Annotations): .*dot.*\. Given: 1 box, 9 ring"
    with pytest.raises(ClassMismatchError, match=lists) as caught:
        open_dataset(kind, *where, other, rules(kind))
    assert str(caught.value).startswith(str(tmp_path))
    with pytest.raises(
        ClassMismatchError, match=r"Given: 1 person, 2 bicycle, 3 car, 4 motorcycle and 129 more"
    ):
        open_dataset(kind, *where, "coco_panoptic", rules(kind))


def test_overlaps_and_crowds() -> None:
    """Things cover stuff, small regions cover large ones, crowds are below other things, and void covers all."""
    categories = Categories(
        "mine",
        ([1, "cell", True, (1, 2, 3)],),  # type: ignore[arg-type]
        ([5, "glass", False, (1, 2, 3)], [6, "background", False, (3, 2, 1)]),  # type: ignore[arg-type]
    )

    def region(id_: int | None, left: int, right: int, crowd: bool = False) -> Region:
        return Region(id_, polygons_rle([[left, 0, right, 0, right, 2, left, 2]], 2, 12), crowd)

    regions = [
        region(1, 4, 6),
        region(1, 3, 8),
        region(5, 0, 7),
        region(5, 9, 10),
        region(1, 2, 9, crowd=True),
        region(1, 4, 5),
        region(1, 4, 6),  # as large as the first, and later: it hides the first
        region(None, 0, 1),
    ]
    sample = Painter(categories, ReadingRules()).paint(
        np.zeros((2, 12, 3), np.uint8), regions, "a", Path("a.png")
    )
    rows = list(zip(sample.isthing.tolist(), sample.label.tolist(), sample.crowd.tolist(), strict=True))
    assert rows == [(False, 2, False), (False, 1, False), (True, 0, True)] + [(True, 0, False)] * 3
    assert sample.segments[0].tolist() == [0, 2, 3, 4, 6, 5, 4, 4, 3, 2, 1, 1]
    assert sample.area.tolist() == [4, 4, 4, 6, 2, 2]


def test_classes_that_are_stuff(tmp_path: Path) -> None:
    where = WRITERS["coco_instances"](tmp_path, "train")
    dataset = open_dataset("coco_instances", *where, rules=ReadingRules(stuff=("dot",)))
    assert [c.name for c in dataset.categories.stuff] == ["dot", "background"]
    sample = dataset.load(1)  # its two dots are one segment
    assert sorted(sample.label[~sample.isthing].tolist()) == [1, 2]
    assert int(sample.area[sample.label == 1][0]) == 20 * 20 + 24 * 20
    with pytest.raises(DataError, match=r"^stuff: expected classes of .*, got 'sky'; it has box, dot"):
        open_dataset("coco_instances", *where, rules=ReadingRules(stuff=("sky",)))


def test_a_class_named_background(tmp_path: Path) -> None:
    path = Path(WRITERS["yolo"](tmp_path, "train")[1])
    path.write_text(path.read_text().replace("dot", "background"))
    with pytest.raises(
        DataError, match=r"data\.yaml: expected the class 'background' to be stuff; name it in stuff, or set"
    ):
        open_dataset("yolo", "train", str(path))
    dataset = open_dataset("yolo", "train", str(path), rules=ReadingRules(stuff=("background",)))
    assert [c.name for c in dataset.categories.all] == ["box", "background"]
    assert len(dataset.load(0).label) == 2
    assert dataset.load(2).label.tolist() == [1]  # nothing is annotated
    void = ReadingRules(background="void", stuff=("background",))
    for given in (None, dataset.categories):
        holes = open_dataset("yolo", "train", str(path), given, void)
        assert [c.name for c in holes.categories.stuff] == ["background"]
        assert holes.load(0).area.tolist() == [16 * 16, 20 * 24]
        assert (holes.load(2).segments == 0).all()
    kept = open_dataset("yolo", "train", str(path), rules=ReadingRules(background="void"))
    assert [c.name for c in kept.categories.things] == ["box", "background"]


def test_rules_are_checked() -> None:
    for settings, message in (
        ({"background": "sky"}, "^background: expected stuff or void, got 'sky'"),
        ({"stuff": ("a", "a")}, r"^stuff: expected different names that are not empty, got \['a', 'a'\]"),
        ({"classes": ("",)}, "^classes: expected different names"),
        ({"label_divisor": -1}, "^label_divisor: expected at least 0, got -1"),
    ):
        with pytest.raises(DataError, match=message):
            ReadingRules(**settings)  # type: ignore[arg-type]


def test_colors_do_not_depend_on_the_order_in_a_file(tmp_path: Path) -> None:
    """Instances and panoptic annotations give the classes the same colors."""
    where = WRITERS["coco_instances"](tmp_path, "train")
    expected = open_dataset("coco_instances", *where).categories.all
    path = Path(where[1])
    content = json.loads(path.read_text())
    content["categories"].reverse()
    path.write_text(json.dumps(content))
    assert open_dataset("coco_instances", *where).categories.all == expected
    assert read_categories(path).all == expected[:-1]  # without the background


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., CocoInstancesDataset]:
    """Returns a function that changes the first annotation and opens the file."""
    images, path = WRITERS["coco_instances"](tmp_path, "train")

    def opened(**changes: Any) -> CocoInstancesDataset:
        content = json.loads(Path(path).read_text())
        content["annotations"][0].update(changes)
        Path(path).write_text(json.dumps(content))
        return CocoInstancesDataset(images, path)

    return opened


RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"segmentation": []},
            "segmentation: expected at least one polygon (a box alone has no mask), got []",
        ),
        ({"segmentation": [[1, 2, 3, 4]]}, "segmentation: expected at least three points as [x1, y1, "),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "segmentation: expected at least three points"),
        (
            {"segmentation": [[1, 2, 3, 4, 5, 1e30]]},
            "segmentation: expected y in -48..96 in an image of 64 x 48",
        ),
        ({"segmentation": [[1, 2, 3, 4, None, 4]]}, "segmentation: expected x in -64..128"),
        ({"segmentation": "abc"}, "segmentation: expected a list of polygons or run lengths, got 'abc'"),
        ({"segmentation": {**RLE, "size": [9, 9]}}, "segmentation: expected the size [48, 64] of the image"),
        (
            {"segmentation": {**RLE, "counts": [5]}},
            "segmentation: expected counts of at least 0 that add up to 3072",
        ),
        ({"segmentation": {**RLE, "counts": [-1, 3073]}}, "segmentation: expected counts of at least 0"),
        ({"segmentation": {**RLE, "counts": "PPPPPPPP"}}, "segmentation: expected counts as a list"),
        (
            {"segmentation": {**RLE, "counts": "1000"}},
            "segmentation: expected compressed counts of 3072 pixels",
        ),
        (
            {"segmentation": {**RLE, "counts": "oooooO0"}},
            "segmentation: expected compressed counts of 3072 pixels",
        ),
        ({"category_id": 7}, "category_id: expected the id of an entry of 'categories', got 7"),
        # The class "background" has the next free id, which no file may use.
        ({"category_id": BACKGROUND_ID}, "category_id: expected the id of an entry of 'categories', got 3"),
        ({"iscrowd": 2}, "iscrowd: expected 0 or 1, got 2"),
    ],
)
def test_wrong_coco_instances(
    coco: Callable[..., CocoInstancesDataset], changes: dict[str, Any], message: str
) -> None:
    dataset = coco(**changes)
    with pytest.raises(DataError) as caught:
        dataset.load(0)
    path, _, rest = str(caught.value).partition(": ")
    assert path.endswith("instances_train.json")
    assert rest.startswith(f"annotations[0].{message}")
    assert len(dataset.load(1).label) == 4


def test_coco_crowds_and_other_images(coco: Callable[..., CocoInstancesDataset]) -> None:
    assert coco(iscrowd=1).load(0).crowd.tolist() == [False, True, False]
    with pytest.raises(
        DataError, match=r"annotations\[0\]\.image_id: expected the id of an entry of 'images', got 77"
    ):
        coco(image_id=77)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 0.5 0.5 0.2 0.2", "line 2: expected a class and a polygon, got a box"),
        ("7 0 0 1 0 1 1", "line 2: class: expected a class of data.yaml, got '7'"),
        (f"{BACKGROUND_ID} 0 0 1 0 1 1", "line 2: class: expected a class of data.yaml, got '3'"),
        ("1.0 0 0 1 0 1 1", "line 2: class: expected a class of data.yaml, got '1.0'"),
        ("1 0 0 1 0 1", "line 2: expected at least three points"),
        ("1 0 0 1 0 1 one", "line 2: expected numbers after the class, got "),
        ("1 0 0 100 0 1 1", "line 2: expected x in -64..128 in an image of 64 x 48 pixels"),
        ("1 0 0 nan 0 1 1", "line 2: expected x in -64..128"),
    ],
)
def test_wrong_yolo_labels(line: str, message: str, tmp_path: Path) -> None:
    where = WRITERS["yolo"](tmp_path, "train")
    path = tmp_path / "labels" / "train" / "0.txt"
    path.write_text(path.read_text().splitlines()[0] + "\n" + line)
    with pytest.raises(DataError) as caught:
        YoloDataset(*where).load(0)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_data_yaml_of_other_tools(tmp_path: Path) -> None:
    WRITERS["yolo"](tmp_path, "train")
    WRITERS["yolo"](tmp_path / "b", "val")
    path = tmp_path / "data.yaml"
    path.write_text(
        "train: ../images/train\nval: [b/images/val, images/train]\nnc: 3\nnames: [none, box, dot]\n"
    )
    assert len(YoloDataset("train", path)) == 3
    both = YoloDataset("val", path)
    assert [both.load(i).image_id for i in range(5)] == [
        *("b/images/val/0.png", "b/images/val/1.png"),
        *("images/train/0.png", "images/train/1.png", "images/train/2.png"),
    ]
    (tmp_path / "list.txt").write_text("images/train/1.png\n\n./images/train/0.png\n")
    path.write_text("train: list.txt\nnames: {1: box, 2: dot}\n")
    assert len(YoloDataset("train", path)) == 2
    assert len(YoloDataset(str(tmp_path / "b" / "images"), path)) == 2
    for text, message in (
        ("names: [box]\nnc: 2", r"data\.yaml: nc: expected 1, as many as 'names' has, got 2"),
        ("nc: 2", r"data\.yaml: lacks 'names'"),
        ("names: box", r"data\.yaml: names: expected names of classes, in a list or by number, got 'box'"),
        ("names: [box", r"data\.yaml: cannot be read as YAML"),
        ("[1]", r"data\.yaml: content: expected an object, got \[1\]"),
        ("names: [box]\ntrain: 3", r"data\.yaml: train: expected a path or a list of paths, got 3"),
        ("names: [box]\ntrain: nowhere", r"nowhere: no such folder or file; .*data\.yaml names it"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            YoloDataset("train", path)


def test_yolo_images_without_any_labels(tmp_path: Path) -> None:
    """Nothing is learned from images whose labels are elsewhere."""
    where = WRITERS["yolo"](tmp_path, "train")
    (tmp_path / "labels").rename(tmp_path / "annotations")
    path = tmp_path / "labels" / "train" / "0.txt"
    with pytest.raises(DataError) as caught:
        YoloDataset(*where)
    assert str(caught.value) == f"{where[1]}: train: found no file of labels; expected one such as {path}"
    path.parent.mkdir(parents=True)
    (tmp_path / "labels" / "train" / "2.txt").touch()
    assert not YoloDataset(*where).load(0).isthing.any()


def test_labelme_shapes(tmp_path: Path) -> None:
    where = WRITERS["labelme"](tmp_path, "train")
    path = tmp_path / "train" / "2.json"
    png = io.BytesIO()
    Image.fromarray(np.tri(4, 6, dtype=bool)).save(png, "PNG")
    shapes: list[dict[str, Any]] = [
        {"label": "box", "shape_type": "circle", "points": [[20, 20], [20, 30]]},
        {"label": "dot", "points": [[40, 0], [44, 0], [44, 4], [40, 4]], "group_id": 3},
        {"label": "dot", "points": [[50, 0], [54, 0], [54, 4], [50, 4]], "group_id": 3},
        {
            "label": "dot",
            "shape_type": "mask",
            "points": [[40, 40], [45, 43]],
            "mask": base64.b64encode(png.getvalue()).decode(),
        },
        {"label": "__ignore__", "shape_type": "rectangle", "points": [[64, 48], [60, 44]]},
    ]
    content = json.loads(path.read_text()) | {"shapes": shapes}
    path.write_text(json.dumps(content))
    sample = LabelMeDataset(*where).load(2)
    areas = sorted(sample.area[sample.isthing].tolist())
    assert areas[:2] == [10, 32]
    assert abs(areas[2] - np.pi * 100) < 12
    assert (sample.segments[44:, 60:] == 0).all()
    for i, change, message in (
        (
            0,
            {"shape_type": "line"},
            r"shapes\[0\]\.shape_type: expected one of polygon, rectangle, circle, mask",
        ),
        (0, {"points": [[1, 2]]}, r"shapes\[0\]\.points: expected two points near an image of 64 x 48"),
        (
            1,
            {"points": [[1, 2], [3]]},
            r"shapes\[1\]\.points: expected at least three points as \[\[x1, y1\]",
        ),
        (1, {"group_id": "a"}, r"shapes\[1\]\.group_id: expected an integer or null, got 'a'"),
        (3, {"mask": "!"}, r"shapes\[3\]\.mask: expected a PNG in base64, got '!'"),
        (3, {"points": [[63, 40], [64, 43]]}, r"shapes\[3\]\.points: expected a place for a mask of 6 x 4"),
        (4, {"label": ""}, r"shapes\[4\]\.label: expected a string that is not empty"),
    ):
        changed = [dict(shape) for shape in shapes]
        changed[i].update(change)
        path.write_text(json.dumps(content | {"shapes": changed}))
        with pytest.raises(DataError, match=rf"^{tmp_path}/train/2\.json: {message}"):
            LabelMeDataset(*where).load(2)
    path.write_text(json.dumps(content | {"imageHeight": 49}))
    with pytest.raises(DataError, match=r"imageHeight: expected 48, the size of .*2\.png, got 49"):
        LabelMeDataset(*where).load(2)
    path.write_text("{")
    broken = LabelMeDataset(*where)
    with pytest.raises(DataError, match=r"2\.json: cannot be read as JSON"):
        broken.load(2)
    with pytest.raises(ClassMismatchError, match=r"train: 'dot' is not among the given classes"):
        LabelMeDataset(*where, rules=ReadingRules(classes=("box",)))
    own = LabelMeDataset(*where).categories
    with pytest.raises(ClassMismatchError, match=r"train: 'lynx' is not among the given classes"):
        LabelMeDataset(*where, own, ReadingRules(classes=("lynx",)))


def test_labels_in_8_bits_and_palettes(tmp_path: Path) -> None:
    """Divisor 0: each value is an instance. Divisor 1: each value is a class, 255 void."""
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[:10], values[10:20], values[-1] = 1, 7, 255
    for name in ("gray", "palette"):
        image = Image.fromarray(values)
        if name == "palette":
            image.putpalette([9, 8, 7] * 256)
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "1.png")
        save(tmp_path / "images" / "1.png", pixels([], 0))
        cells = IdMasksDataset(tmp_path / "images", tmp_path / name).load(0)
        assert cells.isthing.tolist() == [False, True, True, True]
        assert cells.area.tolist() == [(HEIGHT - 21) * WIDTH, 10 * WIDTH, 10 * WIDTH, WIDTH]
        settings: dict[str, Any] = {"classes": tuple("abcdefg"), "label_divisor": 1, "stuff": ("g",)}
        labelled = ReadingRules(**settings, void_values=(255,))
        sample = IdMasksDataset(tmp_path / "images", tmp_path / name, rules=labelled).load(0)
        # The things of a class are one region, in which they are not separated.
        assert sample.isthing.tolist() == [False, True, False]
        assert sample.crowd.tolist() == [False, True, False]
        assert (sample.segments[-1] == 0).all()
        with pytest.raises(DataError, match=r"1\.png: the value 255 has the class 255, which is not among"):
            IdMasksDataset(tmp_path / "images", tmp_path / name, rules=ReadingRules(**settings)).load(0)
    with pytest.raises(DataError, match=r"^classes: expected the names of the classes in the masks"):
        IdMasksDataset(tmp_path / "images", tmp_path / "gray", rules=ReadingRules(label_divisor=1))
    with pytest.raises(DataError, match=r"^label_divisor: expected at least 1 with 2 classes of things"):
        IdMasksDataset(tmp_path / "images", tmp_path / "gray", rules=ReadingRules(classes=("a", "b")))
    save(tmp_path / "images" / "2.png", pixels([], 0))
    with pytest.raises(DataError, match=r"gray/2\.png: no such file"):
        IdMasksDataset(tmp_path / "images", tmp_path / "gray").load(1)


@pytest.mark.parametrize(
    ("value", "divisor"), [(BACKGROUND_ID, 1), (BACKGROUND_ID, 1000), (1000 * BACKGROUND_ID + 7, 1000)]
)
def test_id_masks_cannot_name_the_added_background(value: int, divisor: int, tmp_path: Path) -> None:
    images, masks = WRITERS["masks"](tmp_path, "train")
    save(Path(masks) / "0.png", np.full((HEIGHT, WIDTH), value, np.uint16))
    dataset = IdMasksDataset(images, masks, rules=ReadingRules(classes=CLASSES, label_divisor=divisor))
    assert [c.id for c in dataset.categories.stuff] == [BACKGROUND_ID]
    with pytest.raises(DataError, match=rf"0\.png: the value {value} has the class 3, which is not among"):
        dataset.load(0)


def test_id_masks_with_given_classes(tmp_path: Path) -> None:
    """The k-th name is the class of this name in a given set, whatever its id is."""
    images, masks = WRITERS["masks"](tmp_path, "train")
    coco = get_categories("coco_panoptic")

    def opened(*classes: str, divisor: int = 1000) -> IdMasksDataset:
        return IdMasksDataset(
            images, masks, "coco_panoptic", ReadingRules(classes=classes, label_divisor=divisor)
        )

    assert [c.name for c in opened("dog", "car").load(0).classes(coco)] == ["dog", "car"]
    assert [c.name for c in opened().load(0).classes(coco)] == ["person", "bicycle"]
    with pytest.raises(ClassMismatchError, match=r"'lynx' is not among the given classes \(coco_panoptic\)"):
        opened("dog", "lynx")
    with pytest.raises(DataError, match=r"0\.png: the value 2001 has the class 2, which is not among"):
        opened("dog").load(0)
    # Each value is an instance of the only class.
    assert [c.name for c in opened("dog", divisor=0).load(0).classes(coco)] == ["dog", "dog"]
    for classes, count in ((), 80), (("dog", "car"), 2), (("sea",), 0):
        with pytest.raises(
            DataError,
            match=rf"label_divisor: expected at least 1 with {count} classes of things \(coco_panoptic\), since 0",
        ):
            opened(*classes, divisor=0)


def test_classes_of_coco_without_background(tmp_path: Path) -> None:
    """With COCO's panoptic classes nothing is named background, so pixels without an instance are void."""
    images, path = WRITERS["coco_instances"](tmp_path, "train")
    content = json.loads(Path(path).read_text())
    content["categories"] = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}]
    Path(path).write_text(json.dumps(content))
    dataset = open_dataset("coco_instances", images, path, "coco_panoptic")
    assert dataset.categories == get_categories("coco_panoptic")
    assert torch.equal(dataset.load(0).segments == 0, torch.from_numpy(ids(SCENES["train"][0]) == 0))


def test_absent_classes_in_a_survey(tmp_path: Path) -> None:
    where = WRITERS["coco_instances"](tmp_path, "train")
    content = json.loads(Path(where[1]).read_text())
    for name, text in (
        ("ring", "1 class does not occur: 8 ring"),
        ("wire", "2 classes do not occur: 8 ring, 9 wire"),
    ):
        content["categories"].append({"id": 6 + len(content["categories"]), "name": name})
        Path(where[1]).write_text(json.dumps(content))
        assert survey(open_dataset("coco_instances", *where)).table().splitlines()[-1] == text


def test_masks_of_bitmaps() -> None:
    whole = np.zeros((3, 4), bool)
    whole[1:, 2] = True
    assert bitmap_rle(whole)["size"] == [3, 4]

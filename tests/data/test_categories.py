"""The tables of classes and `Categories`. Tables are facts of the datasets, so the tests list expected rows."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from panfpn_fast.data import Categories, Category, DataError, get_categories, read_categories
from panfpn_fast.data.categories import class_list, fill_colors, numbered_categories, to_categories


@pytest.mark.parametrize(("name", "things", "stuff"), [("coco_panoptic", 80, 53), ("cityscapes", 8, 11)])
def test_counts_order_and_kinds(name: str, things: int, stuff: int) -> None:
    categories = get_categories(name)
    assert categories.name == name
    assert (len(categories.things), len(categories.stuff)) == (things, stuff)
    for group in (categories.things, categories.stuff):
        ids = [category.id for category in group]
        assert ids == sorted(set(ids))
    assert all(category.isthing for category in categories.things)
    assert not any(category.isthing for category in categories.stuff)
    assert len({category.id for category in categories.all}) == things + stuff
    assert len({category.name for category in categories.all}) == things + stuff
    for category in categories.all:
        assert all(0 <= channel <= 255 for channel in category.color)


def test_known_rows_of_coco() -> None:
    coco = get_categories("coco_panoptic")
    assert (coco.things[0].id, coco.things[0].name, coco.things[0].color) == (1, "person", (220, 20, 60))
    assert (coco.things[-1].id, coco.things[-1].name) == (90, "toothbrush")
    assert (coco.stuff[0].id, coco.stuff[0].name) == (92, "banner")
    assert (coco.stuff[-1].id, coco.stuff[-1].name) == (200, "rug-merged")
    # Ids of COCO without a panoptic class.
    assert not {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91} & {category.id for category in coco.all}


def test_known_rows_of_cityscapes() -> None:
    cityscapes = get_categories("cityscapes")
    assert [c.id for c in cityscapes.things] == [24, 25, 26, 27, 28, 31, 32, 33]
    assert [c.id for c in cityscapes.stuff] == [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23]
    assert {c.name: c.color for c in cityscapes.all}["road"] == (128, 64, 128)


def test_display_names_drop_suffixes_only() -> None:
    names = {category.name: category.display_name for category in get_categories("coco_panoptic").all}
    assert names["sky-other-merged"] == "sky"
    assert names["tree-merged"] == "tree"
    assert names["door-stuff"] == "door"
    assert names["water-other"] == "water"
    assert names["wall-brick"] == "wall-brick"
    assert names["traffic light"] == "traffic light"
    assert all(names.values())


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of cityscapes, .*synthetic.*, got 'coco'"):
        get_categories("coco")


CELLS = Categories(
    "cells", (Category(7, "cell", True, (1, 2, 3)),), (Category(9, "glass", False, (4, 5, 6)),)
)


def test_equal_if_ids_and_names_are() -> None:
    same = Categories("other", (Category(7, "cell", True, (9, 9, 9)),), CELLS.stuff)
    assert same == CELLS
    assert hash(same) == hash(CELLS)
    assert not CELLS.difference(same)
    assert CELLS != "cells"
    coco = get_categories("coco_panoptic")
    for other, difference in (
        (
            dataclasses.replace(CELLS, things=(Category(8, "cell", True, (1, 2, 3)),)),
            "things[0] is 'cell' with id 7",
        ),
        (
            dataclasses.replace(CELLS, stuff=(Category(9, "wall", False, (4, 5, 6)),)),
            "stuff[0] is 'glass' with id 9",
        ),
        (dataclasses.replace(CELLS, stuff=()), "1 stuff classes instead of 0"),
        (coco, "1 thing classes instead of 80"),
    ):
        assert other != CELLS
        assert CELLS.difference(other).startswith(difference)
    assert dataclasses.replace(coco, things=coco.things[::-1]) != coco


@pytest.mark.parametrize("categories", [CELLS, get_categories("cityscapes")])
def test_pickle_and_json_keep_all_fields(categories: Categories) -> None:
    fields = dataclasses.asdict(categories)
    copies = (
        pickle.loads(pickle.dumps(categories)),
        Categories(**fields),
        to_categories(json.loads(json.dumps(fields))),
    )
    for copy in copies:
        assert dataclasses.asdict(copy) == fields
        assert copy.things[0].display_name == categories.things[0].display_name
    assert json.loads(json.dumps(fields))["things"][0] == [
        *categories.things[0][:3],
        [*categories.things[0].color],
    ]


def test_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_categories("synthetic").name = "mine"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        CELLS.things[0].name = "crack"  # type: ignore[misc]


def test_repr_fits_on_a_line() -> None:
    assert repr(CELLS) == "Categories('cells', things: cell; stuff: glass)"
    assert len(repr(get_categories("coco_panoptic"))) < 110


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": None}, "name: expected a string, got None"),
        ({"things": "cell"}, "things: expected a list or tuple of classes, got 'cell'"),
        ({"things": ["cell"]}, r"things\[0\]: expected \(id, name, isthing, \(R, G, B\)\), got 'cell'"),
        ({"things": [["7", "cell", True, [1, 2, 3]]]}, r"things\[0\]: expected \(id, name"),
        ({"things": [[7, "cell", True, [1, 2]]]}, r"things\[0\]: expected \(id, name"),
        (
            {"things": [[7, None, True, [1, 2, 3]]]},
            r"things\[0\]: expected a nonempty string as the name, got None",
        ),
        (
            {"things": [[7, "", True, [1, 2, 3]]]},
            r"things\[0\]: expected a nonempty string as the name, got ''",
        ),
        (
            {"things": [[-7, "cell", True, [1, 2, 3]]]},
            r"things\[0\]: expected an id in 0\.\.2147483647, got -7",
        ),
        ({"things": [[7, "cell", 2, [1, 2, 3]]]}, r"things\[0\]: expected isthing to be True"),
        ({"things": [[7, "cell", "yes", [1, 2, 3]]]}, r"things\[0\]: expected isthing to be True"),
        ({"things": [[7, "cell", 1, [1, 2, 256]]]}, r"things\[0\]: expected a color .*got \(1, 2, 256\)"),
        ({"things": [[7, "cell", 1, [-1, 2, 3]]]}, r"things\[0\]: expected a color .*got \(-1, 2, 3\)"),
        (
            {"stuff": [[k, "glass", 0, [1, 2, 3]] for k in range(8, 4104)]},
            "stuff: expected at most 4095 classes",
        ),
        ({"stuff": [[9, "glass", True, [1, 2, 3]]]}, r"stuff\[0\]: expected isthing to be False"),
        ({"stuff": [[7, "glass", False, [1, 2, 3]]]}, "expected unique ids, got 2 classes with the id 7"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CELLS, **fields)
    with pytest.raises(ValueError, match=f"^categories: .*{message}"):
        to_categories({**dataclasses.asdict(CELLS), **fields})


def test_classes_without_colors_get_distinct_ones() -> None:
    for given in ([None] * 20, [(140, 250, 255), None, (0, 0, 0)] + [None] * 17):
        colors = fill_colors(given)
        assert colors == fill_colors(given)
        for i, color in enumerate(colors):
            assert all(0 <= channel <= 255 for channel in color)
            assert given[i] in (None, color)
            for other in colors[:i]:
                assert sum(abs(a - b) for a, b in zip(color, other, strict=True)) > 60
    assert len(set(fill_colors([None] * 133))) == 133


def test_lists_of_classes_are_short() -> None:
    coco = get_categories("coco_panoptic")
    assert class_list(coco.all) == "1 person, 2 bicycle, 3 car, 4 motorcycle and 129 more"
    assert class_list(coco.stuff[:2]) == "92 banner (stuff), 93 blanket (stuff)"
    assert class_list(()) == "none"
    text = coco.compared_with(CELLS)
    assert (
        text
        == f"80 thing classes instead of {len(CELLS.things)}. Data: {class_list(coco.all)}. Network: "
        + (class_list(CELLS.all))
    )
    assert coco.compared_with(coco) == ""


def test_numbered_classes_differ_in_name_and_color() -> None:
    categories = numbered_categories(12, 8)
    assert [c.name for c in (categories.things[0], categories.things[11], categories.stuff[0])] == [
        "thing 1",
        "thing 12",
        "stuff 1",
    ]
    assert [c.id for c in categories.all] == list(range(1, 21))
    assert len({c.color for c in categories.all}) == 20


def test_tables_distinguish_classes_of_one_name() -> None:
    def names(*rows: str) -> list[str]:
        things = [[7 + i, name, True, [1, 2, 3]] for i, name in enumerate(rows)]
        return list(Categories("houses", things, [[3, "window", False, [4, 5, 6]]]).unique_names().values())  # type: ignore[arg-type]

    assert names("door") == ["door", "window"]
    assert names("door", "window") == ["door", "window (id 8)", "window (id 3)"]
    assert len(set(names("window", "window (id 3)", "window"))) == 4


CELL, GLASS = (
    {"id": 7, "name": "cell", "isthing": 1, "color": [220, 20, 60]},
    {"id": 3, "name": "glass", "isthing": 0},
)


@pytest.mark.parametrize(
    "content",
    [
        [CELL, GLASS],
        {"categories": [GLASS, CELL]},
        {"categories": [CELL, GLASS], "images": [], "annotations": [{"id": 1, "segmentation": []}]},
    ],
    ids=["list", "object", "annotations"],
)
def test_categories_of_a_file(content: Any, tmp_path: Path) -> None:
    (tmp_path / "cells.json").write_text(json.dumps(content))
    found = read_categories(tmp_path / "cells.json")
    assert found == Categories(
        "cells", (Category(7, "cell", True, (0, 0, 0)),), (Category(3, "glass", False, (0, 0, 0)),)
    )
    assert (found.name, found.things[0].color) == ("cells", (220, 20, 60))


def test_categories_of_instances_are_things(tmp_path: Path) -> None:
    """The annotations of COCO's instances have no `isthing`."""
    names = [{"id": id_, "name": name, "supercategory": "x"} for id_, name in ((9, "crack"), (2, "cell"))]
    (tmp_path / "instances.json").write_text(json.dumps({"categories": names, "annotations": [{"id": 1}]}))
    found = read_categories(tmp_path / "instances.json")
    assert [(category.id, category.name) for category in found.things] == [(2, "cell"), (9, "crack")]
    assert found.stuff == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a list of categories, or an object with a list 'categories'"),
        (3, "expected a list of categories"),
        ([], "'categories' is empty"),
        ([3], r"categories\[0\]: expected an object, got 3"),
        ([{"name": "a"}], r"categories\[0\] lacks 'id'"),
        ([{"id": 1}], r"categories\[0\] lacks 'name'"),
        ([CELL, {"id": 1, "name": "a"}], r"categories\[1\] lacks 'isthing'"),
        ([CELL, CELL], r"categories\[1\]\.id: expected a unique id, got 7"),
        ([{**CELL, "color": 3}], r"categories\[0\]\.color: expected three integers"),
    ],
)
def test_files_without_usable_categories(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / 'a.json'))}: {message}"):
        read_categories(tmp_path / "a.json")

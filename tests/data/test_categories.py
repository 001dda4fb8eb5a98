"""The label tables: facts of the data sets, so the expectations are written out."""

from __future__ import annotations

import pytest

from panfpn_fast.data import get_categories


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
    # Ids of COCO that no panoptic class uses.
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

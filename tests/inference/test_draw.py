from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from panfpn_fast.data import get_categories, read_categories
from panfpn_fast.inference import Instances, PanopticResult, Segment
from panfpn_fast.inference.drawing import MAX_LABELS, distinct_color, draw_panoptic, instance_color
from panfpn_fast.inference.legend import draw_legend, legend_rows

COCO = get_categories("coco_panoptic")
GREY = np.full((120, 200, 3), 128, np.uint8)


def test_size_mode_and_void(result: PanopticResult) -> None:
    drawing = result.draw(GREY)
    assert (drawing.mode, drawing.size) == ("RGB", (200, 120))
    pixels = np.asarray(drawing)
    # Void pixels show the image, except for the outline at their border.
    assert (pixels[:, 193:] == 128).all()
    assert (GREY == 128).all()


def test_pixels_blend_towards_the_class_color(result: PanopticResult) -> None:
    pixels = np.asarray(result.draw(GREY, opacity=0.5, labels=False)).astype(int)
    person, grass = COCO.things[0].color, COCO.stuff[45].color
    np.testing.assert_allclose(pixels[30, 20], (128 + np.array(person)) / 2, atol=1)
    # Stuff has a lower opacity than things.
    np.testing.assert_allclose(pixels[100, 20], 128 + 0.425 * (np.array(grass) - 128), atol=1)


def test_instances_of_one_class_differ(result: PanopticResult) -> None:
    pixels = np.asarray(result.draw(GREY, labels=False)).astype(int)
    assert np.abs(pixels[30, 20] - pixels[30, 160]).max() >= 15


def test_outline_between_segments(result: PanopticResult) -> None:
    pixels = np.asarray(result.draw(GREY, labels=False)).astype(int)
    inside, border = pixels[30, 20], pixels[30, 89]
    assert border.sum() > inside.sum() + 100
    assert (pixels[30, 89] != pixels[30, 20]).any()


def test_names_are_written_inside_their_segments(result: PanopticResult) -> None:
    plain = np.asarray(result.draw(GREY, labels=False)).astype(int)
    named = np.asarray(result.draw(GREY)).astype(int)
    changed = (plain != named).any(axis=2)
    panoptic = result.panoptic.numpy()
    for segment in result.segments:
        mine = changed & (panoptic == segment.id)
        # A legible name has at least 8 x 20 pixels, and light text on a dark plate.
        rows, columns = np.nonzero(mine)
        assert rows.max() - rows.min() >= 8
        assert columns.max() - columns.min() >= 20
        assert named[mine].max() > 220
        assert named[mine].min() < 90
    assert not changed[panoptic == 0].any()


def test_opacity_zero_shows_the_image_inside_segments(result: PanopticResult) -> None:
    pixels = np.asarray(result.draw(GREY, opacity=0.0, labels=False))
    assert (pixels[30, 20] == 128).all()
    assert (np.asarray(result.draw(GREY, opacity=1.0, labels=False))[30, 20] == COCO.things[0].color).all()


def test_drawing_is_deterministic(result: PanopticResult) -> None:
    assert result.draw(GREY).tobytes() == result.draw(GREY).tobytes()


def test_image_may_be_a_path_or_pil(result: PanopticResult, tmp_path: Path) -> None:
    expected = result.draw(GREY).tobytes()
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    assert result.draw(str(tmp_path / "grey.png")).tobytes() == expected
    assert result.draw(Image.fromarray(GREY)).tobytes() == expected


def test_image_of_another_size_is_rejected(result: PanopticResult) -> None:
    with pytest.raises(ValueError, match=r"image: expected height and width \[120, 200\].*got \[120, 199\]"):
        result.draw(GREY[:, :-1])


@pytest.mark.parametrize("opacity", [-0.1, 1.5, float("nan")])
def test_bad_opacity(result: PanopticResult, opacity: float) -> None:
    with pytest.raises(ValueError, match=r"opacity: expected a number in 0\.\.1"):
        result.draw(GREY, opacity=opacity)


def test_no_segments() -> None:
    empty = Instances(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 28, 28))
    void = torch.zeros(5, 7, dtype=torch.int32)
    result = PanopticResult(void, [], empty, void.to(torch.uint8), COCO)
    image = np.full((5, 7, 3), 9, np.uint8)
    assert (np.asarray(result.draw(image)) == 9).all()
    assert result.summary() == "nothing"
    assert len(result.instances) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2), (9, 700)])
def test_tiny_and_thin_images(size: tuple[int, int]) -> None:
    panoptic = np.ones(size, np.int32)
    panoptic[size[0] // 2 :, size[1] // 2 :] = 2
    segments = [(1, COCO.things[0]), (2, COCO.stuff[0])]
    drawing = draw_panoptic(np.zeros((*size, 3), np.uint8), panoptic, segments)
    assert drawing.size == (size[1], size[0])


def test_many_small_segments_get_no_overlapping_names() -> None:
    # Each square has 20 x 20 pixels, too few for "person". So a name extends beyond its square or is left out.
    rows, columns = np.mgrid[:200, :200] // 20
    panoptic = (rows * 10 + columns + 1).astype(np.int32)
    segments = [(i + 1, COCO.things[0]) for i in range(100)]
    image = np.full((200, 200, 3), 128, np.uint8)
    plain = np.asarray(draw_panoptic(image, panoptic, segments, labels=False)).astype(int)
    named = np.asarray(draw_panoptic(image, panoptic, segments)).astype(int)
    assert 0 < (plain != named).any(axis=2).mean() < 0.9


def test_ids_may_be_large_and_unordered() -> None:
    panoptic = np.array([[7_000_001, 7_000_001, 3, 3, 99, 99]] * 6, np.int64).repeat(10, 1).repeat(10, 0)
    segments = [(7_000_001, COCO.things[16]), (3, COCO.things[17])]
    pixels = np.asarray(
        draw_panoptic(np.zeros((60, 60, 3), np.uint8), panoptic, segments, opacity=1.0, labels=False)
    )
    assert tuple(pixels[30, 10]) == COCO.things[16].color
    assert tuple(pixels[30, 30]) == COCO.things[17].color
    assert tuple(pixels[30, 50]) == (0, 0, 0)  # 99 is not in `segments`, so it is void


def test_more_segments_than_16_bits_can_number() -> None:
    segments = [(number, COCO.things[16]) for number in range(1, 2**16 + 1)]
    segments.append((2**16 + 1, COCO.things[17]))
    panoptic = np.full((60, 60), 2**16 + 1)
    drawing = draw_panoptic(np.zeros((60, 60, 3), np.uint8), panoptic, segments, opacity=1.0)
    assert drawing.getpixel((2, 2)) == COCO.things[17].color


def test_large_images_get_large_names() -> None:
    heights = []
    for scale in (1, 4):
        panoptic = np.ones((300 * scale, 400 * scale), np.int32)
        image = np.full((*panoptic.shape, 3), 128, np.uint8)
        arguments = (image, panoptic, [(1, COCO.things[16])])
        changed = np.asarray(draw_panoptic(*arguments)) != np.asarray(draw_panoptic(*arguments, labels=False))
        heights.append(int(changed.any(axis=(1, 2)).sum()))
    assert 3 * heights[0] < heights[1] < 5 * heights[0]


def test_instance_colors_are_valid_and_distinct() -> None:
    for category in COCO.things:
        shades = [instance_color(category.color, index) for index in range(6)]
        assert shades[0] == category.color
        assert len(set(shades)) == 6
        assert all(0 <= channel <= 255 for shade in shades for channel in shade)


def test_summary_and_repr(result: PanopticResult) -> None:
    assert result.summary() == "2 person, grass"
    assert repr(result) == "PanopticResult(120 x 200: 2 person, grass)"
    assert result.category(result.segments[2]).color == COCO.stuff[45].color


def test_segments_are_immutable() -> None:
    segment = Segment(1, 18, "dog", True, 16, 0.5, 10)
    assert segment == Segment(1, 18, "dog", True, 16, 0.5, 10)
    with pytest.raises(AttributeError):
        segment.id = 2  # type: ignore[misc]


def many(count: int = 40) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[tuple[int, Any]]]:
    """Returns a grey image with a row of persons and cars above sky."""
    panoptic = np.full((240, 400), count + 1, np.int32)
    panoptic[150:200] = np.arange(400) * count // 400 + 1
    segments = [(number + 1, COCO.things[number % 2 * 2]) for number in range(count)]
    return np.full((240, 400, 3), 128, np.uint8), panoptic, [*segments, (count + 1, COCO.stuff[39])]


def changed_by(first: dict[str, Any], second: dict[str, Any], count: int = 40) -> np.ndarray[Any, Any]:
    """Returns the pixels in which two drawings differ."""
    drawings = [np.asarray(draw_panoptic(*many(count), **options)) for options in (first, second)]
    return (drawings[0] != drawings[1]).any(axis=2)


def test_color_by_instance(result: PanopticResult) -> None:
    by_class, by_instance = (
        np.asarray(result.draw(GREY, labels=False, opacity=1.0, color_by=word))
        for word in ("class", "instance")
    )
    assert tuple(by_class[30, 20]) == COCO.things[0].color
    assert tuple(by_instance[30, 20]) == distinct_color(0)
    assert tuple(by_instance[30, 160]) == distinct_color(1)
    assert (by_class[100, 20] == by_instance[100, 20]).all()  # stuff


def test_distinct_colors_differ_and_are_not_grey() -> None:
    colors = np.array([distinct_color(index) for index in range(200)])
    assert ((colors.max(axis=1) - colors.min(axis=1)) > 90).all()
    assert colors.min() >= 0
    assert colors.max() <= 255
    assert (np.abs(np.diff(colors, axis=0)).max(axis=1) > 60).all()
    assert len(np.unique(colors, axis=0)) == 200


def test_classes_without_a_color_are_not_grey(tmp_path: Path) -> None:
    path = tmp_path / "panoptic.json"
    rows = [{"id": number, "name": f"class {number}", "isthing": number % 2} for number in range(1, 30)]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": rows}))
    colors = np.array([category.color for category in read_categories(path).all])
    assert ((colors.max(axis=1) - colors.min(axis=1)) > 30).all()
    assert len(np.unique(colors, axis=0)) == 29


def test_boxes_are_those_of_the_segments(result: PanopticResult) -> None:
    plain = np.asarray(result.draw(GREY, labels=False)).astype(int)
    boxed = np.asarray(result.draw(GREY, labels=False, boxes=True)).astype(int)
    changed = (plain != boxed).any(axis=2)
    assert changed[0, :190].all()
    assert changed[:59, 0].all()
    assert not changed[1:59, 2:88].any()
    assert not changed[60:].any()  # stuff has no box
    assert not changed[:, 190:].any()


def test_scores_lengthen_the_names_of_things(result: PanopticResult) -> None:
    drawings = [result.draw(GREY, labels=False), result.draw(GREY), result.draw(GREY, scores=True)]
    plain, named, scored = (np.asarray(drawing).astype(int) for drawing in drawings)
    widths = []
    for drawing in (named, scored):
        columns = np.flatnonzero((drawing != plain).any(axis=2)[:60, :90].any(axis=0))
        widths.append(columns.max() - columns.min())
    assert widths[1] > 1.3 * widths[0]
    assert (named[70:110, :180] == scored[70:110, :180]).all()  # stuff has no score


def test_a_legend_beyond_the_limit() -> None:
    legend = changed_by({"max_labels": 0}, {"labels": False})
    rows, columns = np.nonzero(legend)
    box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    assert legend[box].mean() > 0.95  # one filled rectangle, and no names
    assert rows.min() == 0  # in an upper corner, because the things are below
    assert not legend[150:200].any()
    drawn = np.asarray(draw_panoptic(*many(), max_labels=0))[box].reshape(-1, 3)
    for category in (COCO.stuff[39], COCO.things[0], COCO.things[2]):
        assert (drawn == category.color).all(axis=1).any()


def test_names_stay_outside_the_legend() -> None:
    legend = changed_by({"max_labels": 0}, {"labels": False})
    few = np.asarray(draw_panoptic(*many(), max_labels=3))
    only_legend = np.asarray(draw_panoptic(*many(), max_labels=0))
    assert (few[legend] == only_legend[legend]).all()
    assert (few != only_legend).any()


def test_the_limit_counts_visible_segments() -> None:
    assert not changed_by({"max_labels": 41}, {"max_labels": None}).any()
    assert changed_by({"max_labels": 40}, {"max_labels": None}).any()
    assert not changed_by({}, {"max_labels": MAX_LABELS}).any()
    image, panoptic, segments = many(3)
    absent = [(100 + number, COCO.things[4]) for number in range(50)]
    drawings = [draw_panoptic(image, panoptic, more) for more in (segments, [*segments, *absent])]
    assert drawings[0].tobytes() == drawings[1].tobytes()


def test_a_small_image_gets_no_legend() -> None:
    panoptic = np.arange(1, 26, dtype=np.int32).reshape(5, 5)
    segments = [(number, COCO.things[0]) for number in range(1, 26)]
    image = np.zeros((5, 5, 3), np.uint8)
    drawings = [draw_panoptic(image, panoptic, segments, max_labels=limit) for limit in (1, None)]
    assert drawings[0].tobytes() == drawings[1].tobytes()


def test_rows_of_the_legend() -> None:
    names, colors = ["person", "sky", "person", "car", "dog"], [(i, i, i) for i in range(5)]
    rows = legend_rows(names, colors, np.array([10, 35, 30, 0, 4]))
    assert rows == [
        ("person (2)", [(2, 2, 2), (0, 0, 0)]),
        ("sky", [(1, 1, 1)]),
        ("dog", [(4, 4, 4)]),
    ]
    image = Image.new("RGB", (200, 100))
    x1, y1, x2, y2 = draw_legend(image, np.zeros((100, 200), bool), rows * 20) or (0, 0, 0, 0)
    assert 0 <= x1 < x2 <= 200
    assert 0 <= y1 < y2 <= min(100, y1 + 60)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"color_by": "score"}, ValueError, 'color_by: expected "class" or "instance", got \'score\''),
        ({"max_labels": -1}, ValueError, "max_labels: expected at least 0, got -1"),
        ({"max_labels": 2.0}, TypeError, "max_labels: expected an integer or None, got float"),
        ({"max_labels": True}, TypeError, "max_labels: expected an integer or None, got bool"),
    ],
)
def test_bad_options(
    result: PanopticResult, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        result.draw(GREY, **options)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from panfpn_fast.data import get_categories
from panfpn_fast.inference import Instances, PanopticResult, Segment
from panfpn_fast.inference.visualize import draw_panoptic, instance_color

COCO = get_categories("coco_panoptic")
GREY = np.full((120, 200, 3), 128, np.uint8)


def test_size_mode_and_void(result: PanopticResult) -> None:
    picture = result.draw(GREY)
    assert (picture.mode, picture.size) == ("RGB", (200, 120))
    pixels = np.asarray(picture)
    # Void keeps the photograph, but for the outline at its border.
    assert (pixels[:, 193:] == 128).all()
    assert (GREY == 128).all()


def test_pixels_blend_towards_the_class_color(result: PanopticResult) -> None:
    pixels = np.asarray(result.draw(GREY, opacity=0.5, labels=False)).astype(int)
    person, grass = COCO.things[0].color, COCO.stuff[45].color
    np.testing.assert_allclose(pixels[30, 20], (128 + np.array(person)) / 2, atol=1)
    # Stuff is covered less than things.
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
        # Room for a legible name: at least 8 x 20 pixels, with light text on dark.
        rows, columns = np.nonzero(mine)
        assert rows.max() - rows.min() >= 8
        assert columns.max() - columns.min() >= 20
        assert named[mine].max() > 220
        assert named[mine].min() < 90
    assert not changed[panoptic == 0].any()


def test_opacity_zero_leaves_the_inside_alone(result: PanopticResult) -> None:
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


def test_another_size_is_refused(result: PanopticResult) -> None:
    with pytest.raises(ValueError, match=r"image: expected height and width \[120, 200\].*got \[120, 199\]"):
        result.draw(GREY[:, :-1])


@pytest.mark.parametrize("opacity", [-0.1, 1.5, float("nan")])
def test_bad_opacity(result: PanopticResult, opacity: float) -> None:
    with pytest.raises(ValueError, match=r"opacity: expected a number in 0\.\.1"):
        result.draw(GREY, opacity=opacity)


def test_no_segments() -> None:
    empty = Instances(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 28, 28))
    void = torch.zeros(5, 7, dtype=torch.int32)
    result = PanopticResult(void, [], empty, void.to(torch.uint8))
    image = np.full((5, 7, 3), 9, np.uint8)
    assert (np.asarray(result.draw(image)) == 9).all()
    assert result.summary() == "nothing"
    assert len(result.instances) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2), (9, 700)])
def test_tiny_and_thin_images(size: tuple[int, int]) -> None:
    panoptic = np.ones(size, np.int32)
    panoptic[size[0] // 2 :, size[1] // 2 :] = 2
    segments = [(1, COCO.things[0]), (2, COCO.stuff[0])]
    picture = draw_panoptic(np.zeros((*size, 3), np.uint8), panoptic, segments)
    assert picture.size == (size[1], size[0])


def test_many_small_segments_get_no_overlapping_names() -> None:
    # A chessboard of 20 x 20 pixels: too small for "person", so a name sticks out or is left away.
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
    assert tuple(pixels[30, 50]) == (0, 0, 0)  # 99 is no segment: void


def test_large_pictures_get_large_names() -> None:
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


def test_segments_are_immutable_values() -> None:
    segment = Segment(1, 18, "dog", True, 16, 0.5, 10)
    assert segment == Segment(1, 18, "dog", True, 16, 0.5, 10)
    with pytest.raises(AttributeError):
        segment.id = 2  # type: ignore[misc]

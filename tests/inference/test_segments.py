"""Masks, boxes, polygons and run lengths of segments, compared with pycocotools."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_array_equal

from panfpn_fast.data import get_categories
from panfpn_fast.inference import Instances, PanopticResult, Segment
from panfpn_fast.inference.polygons import mask_polygons

COCO = get_categories("coco_panoptic")
Mask = npt.NDArray[np.bool_]
masks = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda shape: arrays(np.bool_, shape))


@pytest.fixture(scope="module")
def coco_mask() -> Any:
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    return importlib.import_module("pycocotools.mask")


def segment_of(mask: Mask, id_: int = 1) -> Segment:
    """Returns the segment of a result whose map has the id in the mask, and another id elsewhere."""
    panoptic = torch.from_numpy(np.where(mask, id_, id_ + 1).astype(np.int32))
    nothing = Instances(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 28, 28))
    segment = Segment(id_, 1, "person", True, 0, 0.5, int(mask.sum()), 0)
    [segment] = PanopticResult(panoptic, [segment], nothing, torch.zeros(mask.shape).byte(), COCO).segments
    return segment


def signed_area(polygon: list[int]) -> float:
    x, y = np.array(polygon).reshape(-1, 2).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def test_segments_of_a_result(result: PanopticResult) -> None:
    first, second, grass = result.segments
    for segment in result.segments:
        assert segment.mask.dtype == torch.bool
        assert torch.equal(segment.mask, result.panoptic == segment.id)
        assert int(segment.mask.sum()) == segment.area
    assert [segment.bbox for segment in result.segments] == [
        (0, 0, 90, 60),
        (90, 0, 100, 60),
        (0, 60, 190, 60),
    ]
    assert first.polygons() == [[0, 0, 90, 0, 90, 60, 0, 60]]
    assert second.rle()["size"] == [120, 200]
    assert (first.score, first.instance) == (0.9, 0)
    assert (grass.score, grass.instance) == (None, None)
    assert "_panoptic" not in repr(first)


def test_masks_share_no_memory(result: PanopticResult) -> None:
    result.segments[0].mask.zero_()
    assert int(result.segments[0].mask.sum()) == result.segments[0].area


@settings(max_examples=200, deadline=None)
@given(mask=masks)
def test_polygons_and_run_lengths_are_the_mask(coco_mask: Any, mask: Mask) -> None:
    segment = segment_of(mask)
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    assert segment.rle() == {"size": list(mask.shape), "counts": encoded["counts"]}
    polygons = segment.polygons()
    assert sum(map(signed_area, polygons)) == segment.area  # clockwise in an image, whose y axis goes down
    if not mask.any():
        assert (polygons, segment.bbox) == ([], (0, 0, 0, 0))
        return
    assert list(segment.bbox) == coco_mask.toBbox(encoded).tolist()
    drawn = coco_mask.frPyObjects([list(map(float, one)) for one in polygons], *mask.shape)
    assert_array_equal(coco_mask.decode(coco_mask.merge(drawn)), mask)


def test_one_pixel() -> None:
    segment = segment_of(np.ones((1, 1), bool))
    assert segment.bbox == (0, 0, 1, 1)
    assert segment.polygons() == [[0, 0, 1, 0, 1, 1, 0, 1]]
    assert segment.rle() == {"size": [1, 1], "counts": b"01"}


def test_holes_are_joined_by_cuts() -> None:
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    assert mask_polygons(ring) == [[0, 0, 3, 0, 3, 3, 0, 3, 0, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1, 0, 1]]


def test_pixels_that_touch_at_a_corner_are_two_polygons() -> None:
    assert mask_polygons(np.eye(2, dtype=bool)) == [[0, 0, 1, 0, 1, 1, 0, 1], [1, 1, 2, 1, 2, 2, 1, 2]]


def test_a_long_chain_of_holes() -> None:
    """The holes of each row are joined one to the next."""
    mask = np.ones((3, 5001), bool)
    mask[1, 1::2] = False
    [polygon] = mask_polygons(mask)
    assert signed_area(polygon) == mask.sum()


def test_large_maps(coco_mask: Any) -> None:
    y, x = np.mgrid[:600, :3000]
    mask = np.sin(x / 37) + np.cos(y / 23 + x / 91) > -0.9
    assert (
        segment_of(mask, 70_000).rle()["counts"]
        == coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]
    )


def test_pickled_and_copied_segments_keep_their_map(result: PanopticResult) -> None:
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert again.segments == result.segments
        assert torch.equal(again.segments[1].mask, result.segments[1].mask)
        assert again.segments[0]._panoptic is again.panoptic  # one copy for all


def test_a_segment_without_a_result() -> None:
    alone = Segment(3, 1, "person", True, 0, 0.5, 1)
    for use in (lambda: alone.mask, lambda: alone.bbox, alone.polygons, alone.rle):
        with pytest.raises(
            ValueError, match=r"segment 3: expected a segment of a PanopticResult.*result\.segments"
        ):
            use()


def test_a_segment_is_a_row_of_plain_values(result: PanopticResult) -> None:
    rows = [asdict(segment) for segment in result.segments]
    assert json.loads(json.dumps(rows))[2] == {
        "id": 3,
        "category_id": 193,
        "name": "grass-merged",
        "isthing": False,
        "class_index": 45,
        "score": None,
        "area": 11400,
        "instance": None,
    }

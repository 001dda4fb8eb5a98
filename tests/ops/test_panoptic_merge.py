from __future__ import annotations

import inspect
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panfpn_fast.ops import panoptic_merge, paste_masks, reference
from support.mask_samples import merge_samples
from support.op_checks import OPS, Sample, run_op_checks
from support.op_samples import DEGENERATE_BOXES, generator, random_boxes

INF, NAN = float("inf"), float("nan")


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    return merge_samples(dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["panoptic_merge"], make_samples(dtype, device))


# Boxes of instances in a 4 x 4 image, with masks of ones. A mask pixel covers at most two image pixels, so that masks
# have sharp edges.
LEFT = [0.0, 0.0, 2.0, 4.0]
MIDDLE = [1.0, 0.0, 3.0, 4.0]
RIGHT = [2.0, 0.0, 4.0, 4.0]
CORNER = [0.0, 0.0, 2.0, 2.0]
FLAT = [1.0, 1.0, 1.0, 3.0]


def merge(
    boxes: list[list[float]], scores: list[float], semantic: Any, device: torch.device, **kwargs: Any
) -> tuple[list[list[int]], list[tuple[Any, ...]]]:
    """Merges instances of classes 10, 11, ... into a 4 x 4 image; returns the map and the rows of the segment table."""
    panoptic, segments = panoptic_merge(
        torch.ones(len(boxes), 2, 2, device=device),
        torch.tensor(boxes, device=device).reshape(-1, 4),
        torch.tensor(scores, device=device),
        torch.arange(len(boxes), device=device) + 10,
        torch.as_tensor(semantic, device=device),
        (4, 4),
        **{"stuff_area_threshold": 2, **kwargs},
    )
    assert panoptic.dtype == torch.int32
    assert panoptic.device.type == device.type
    dtypes = [column.dtype for column in segments]
    assert dtypes == [torch.int32, torch.bool, torch.int64, torch.float32, torch.int64, torch.int64]
    rows = list(zip(*(column.tolist() for column in segments), strict=True))
    for id, *_, area, _ in rows:
        assert (panoptic == id).sum() == area
    rounded = [
        (id, isthing, label, round(score, 4), area, instance)
        for id, isthing, label, score, area, instance in rows
    ]
    return panoptic.tolist(), rounded


def test_4_by_4_by_hand(device: torch.device) -> None:
    semantic = [[7, 0, 0, 2], [7, 0, 0, 2], [7, 0, 0, 2], [7, 0, 0, 5]]
    # Half of MIDDLE is taken, which is not too much. CORNER is taken completely, FLAT is empty, and the score of RIGHT
    # is too low. Stuff 7 is covered by LEFT, stuff 5 has one free pixel, and label 0 is not stuff.
    panoptic, segments = merge(
        [RIGHT, CORNER, LEFT, FLAT, MIDDLE], [0.4, 0.7, 0.9, 0.6, 0.8], semantic, device
    )
    assert panoptic == [[1, 1, 2, 3], [1, 1, 2, 3], [1, 1, 2, 3], [1, 1, 2, 0]]
    assert segments == [
        (1, True, 12, 0.9, 8, 2),
        (2, True, 14, 0.8, 4, 4),
        (3, False, 2, 0.0, 3, -1),
    ]


def test_overlap_at_and_above_the_threshold(device: torch.device) -> None:
    nothing = torch.zeros(4, 4, dtype=torch.uint8)
    for overlap_threshold, kept in ((0.5, [0, 1]), (0.499, [0]), (1.0, [0, 1])):
        _, segments = merge([LEFT, MIDDLE], [0.9, 0.8], nothing, device, overlap_threshold=overlap_threshold)
        assert [row[-1] for row in segments] == kept, overlap_threshold


def test_overlap_counts_all_previous_instances(device: torch.device) -> None:
    # Each of the first two instances takes half of the third one; neither alone exceeds 0.6.
    _, segments = merge(
        [LEFT, RIGHT, MIDDLE],
        [0.9, 0.8, 0.7],
        torch.zeros(4, 4, dtype=torch.int64),
        device,
        overlap_threshold=0.6,
    )
    assert [row[-1] for row in segments] == [0, 1]


def test_an_instance_without_free_pixels_gives_no_segment(device: torch.device) -> None:
    nothing = torch.zeros(4, 4, dtype=torch.uint8)
    panoptic, segments = merge([LEFT, CORNER, RIGHT], [0.9, 0.8, 0.7], nothing, device, overlap_threshold=1.0)
    assert [(row[0], row[-1]) for row in segments] == [(1, 0), (2, 2)]
    assert panoptic == [[1, 1, 2, 2]] * 4


def test_score_at_the_threshold_is_kept_in_double(device: torch.device) -> None:
    nothing = torch.zeros(4, 4, dtype=torch.uint8)
    for threshold, kept in ((0.5, [0]), (0.500001, [])):
        assert [
            row[-1] for row in merge([LEFT], [0.5], nothing, device, score_threshold=threshold)[1]
        ] == kept
    # In float32, 0.7 is 0.69999999 and 0.3 is 0.30000001.
    assert merge([LEFT], [0.7], nothing, device, score_threshold=0.7)[1] == []
    assert len(merge([LEFT], [0.3], nothing, device, score_threshold=0.3)[1]) == 1


def test_equal_scores_keep_their_order_and_nan_is_last(device: torch.device) -> None:
    nothing = torch.zeros(4, 4, dtype=torch.uint8)
    columns = [[float(x), 0.0, x + 1.0, 4.0] for x in range(4)]
    _, segments = merge(columns, [NAN, 0.6, 0.8, 0.6], nothing, device)
    assert [row[-1] for row in segments] == [2, 1, 3, 0]
    # The first score below the threshold also drops all later instances, so the instance with the NaN is dropped.
    _, segments = merge(columns, [NAN, 0.6, 0.4, 0.6], nothing, device)
    assert [row[-1] for row in segments] == [1, 3]


def test_stuff_at_and_below_the_area_threshold(device: torch.device) -> None:
    semantic = [[3, 3, 3, 3], [3, 9, 9, 9], [9, 0, 0, 0], [1, 1, 1, 0]]
    _, segments = merge([], [], semantic, device, stuff_area_threshold=4)
    assert [(row[0], row[2], row[4]) for row in segments] == [(1, 3, 5), (2, 9, 4)]
    _, segments = merge([], [], semantic, device, stuff_area_threshold=5)
    assert [(row[0], row[2], row[4]) for row in segments] == [(1, 3, 5)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_type(dtype: torch.dtype, device: torch.device) -> None:
    largest = min(torch.iinfo(dtype).max, 4095)
    semantic = torch.tensor([[largest] * 4, [1] * 4, [0] * 4, [2] * 4], dtype=dtype)
    panoptic, segments = merge([], [], semantic, device)
    assert [row[2] for row in segments] == [1, 2, largest]
    assert panoptic == [[3] * 4, [1] * 4, [0] * 4, [2] * 4]


def test_labels_out_of_range_are_void(device: torch.device) -> None:
    semantic = torch.tensor([[-1] * 4, [4096] * 4, [2**31 - 1] * 4, [2] * 4], dtype=torch.int32)
    panoptic, segments = merge([], [], semantic, device)
    assert [row[2] for row in segments] == [2]
    assert panoptic == [[0] * 4] * 3 + [[1] * 4]


@pytest.mark.parametrize("mask_threshold", [0.0, -1.0])
def test_a_threshold_that_all_pixels_reach(mask_threshold: float, device: torch.device) -> None:
    # As in paste_masks with threshold 0, pixels far from the box have the value 0 and so reach the threshold.
    panoptic, segments = panoptic_merge(
        torch.ones(1, 2, 2, device=device),
        torch.tensor([CORNER], device=device),
        torch.tensor([0.9], device=device),
        torch.tensor([3], device=device),
        torch.ones(40, 50, dtype=torch.uint8, device=device),
        (40, 50),
        mask_threshold=mask_threshold,
    )
    assert panoptic.eq(1).all()
    assert segments.area.tolist() == [2000]


def test_masks_with_a_channel_and_boolean_masks(device: torch.device) -> None:
    box, score = torch.tensor([LEFT], device=device), torch.tensor([0.9], device=device)
    classes, semantic = torch.tensor([3], device=device), torch.zeros(4, 4, dtype=torch.int64, device=device)
    for masks in (torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)):
        panoptic, _ = panoptic_merge(masks.to(device), box, score, classes.int(), semantic, (4, 4))
        assert panoptic.tolist() == [[1, 1, 0, 0]] * 4


def test_share_in_double_and_in_float32(device: torch.device) -> None:
    nothing = torch.zeros(4, 4, dtype=torch.uint8)
    # MIDDLE has 8 pixels and LEFT takes 4 of them. The share is 0.5 in double; mmdetection computes 4 / (8 + 1e-5),
    # which is 0.49999937.
    for threshold, kept in ((0.4999995, [0, 1]), (0.4999993, [0])):
        _, segments = merge(
            [LEFT, MIDDLE], [0.9, 0.8], nothing, device, rule="mmdetection", overlap_threshold=threshold
        )
        assert [row[-1] for row in segments] == kept, threshold
        for rule in ("detectron2", "panopticapi"):
            _, segments = merge(
                [LEFT, MIDDLE], [0.9, 0.8], nothing, device, rule=rule, overlap_threshold=threshold
            )
            assert [row[-1] for row in segments] == [0], rule


def test_nan_after_a_score_below_the_threshold(device: torch.device) -> None:
    nothing = torch.zeros(4, 4, dtype=torch.uint8)
    for rule, kept in (("detectron2", [2]), ("mmdetection", [2]), ("panopticapi", [2, 0])):
        _, segments = merge([RIGHT, LEFT, LEFT], [NAN, 0.4, 0.6], nothing, device, rule=rule)
        assert [row[-1] for row in segments] == kept, rule


def test_no_score_threshold(device: torch.device) -> None:
    # mmdetection's own merging has no score threshold.
    nothing = torch.zeros(4, 4, dtype=torch.uint8)
    _, segments = merge([LEFT, RIGHT], [-3.0, 0.1], nothing, device, rule="mmdetection", score_threshold=-INF)
    assert [row[-1] for row in segments] == [1, 0]


def merge_by_pixels(
    pasted: Tensor, scores: list[float], semantic: Tensor, rule: str, thresholds: tuple[float, float, int]
) -> tuple[np.ndarray[Any, Any], list[tuple[int, int]]]:
    """The loops of the peers in NumPy: returns the map and (instance or -label, area) of each segment."""
    score_threshold, overlap_threshold, stuff_area = thresholds
    taken = np.zeros(semantic.shape, dtype=bool)
    panoptic = np.zeros(semantic.shape, dtype=np.int32)
    rows: list[tuple[int, int]] = []
    placed = sorted(
        range(len(scores)),
        key=lambda i: (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i]),
    )
    if rule == "panopticapi":
        placed = [i for i in placed if not scores[i] < score_threshold]
    else:
        low = [position for position, i in enumerate(placed) if scores[i] < score_threshold]
        placed = placed[: low[0]] if low else placed
    for i in placed:
        mask = pasted[i].numpy()
        area, claimed = int(mask.sum()), int((mask & taken).sum())
        if area == 0:
            continue
        if rule == "mmdetection":
            share = np.float32(claimed) / (np.float32(area) + np.float32(1e-5))
            too_much = bool(share > np.float32(overlap_threshold))
        else:
            too_much = claimed / area > overlap_threshold
        if too_much or claimed == area:
            continue
        rows.append((i, area - claimed))
        panoptic[mask & ~taken] = len(rows)
        taken |= mask
    for label in range(1, 4096):
        left = (semantic.numpy() == label) & ~taken
        if left.sum() > 0 and left.sum() >= stuff_area:
            rows.append((-label, int(left.sum())))
            panoptic[left] = len(rows)
    return panoptic, rows


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.integers(0, 12), st.integers(0, 300)),
    st.tuples(st.integers(1, 40), st.integers(1, 70)),
    st.tuples(st.integers(1, 12), st.integers(1, 9)),
    st.sampled_from(["detectron2", "mmdetection", "panopticapi"]),
    st.tuples(st.sampled_from([0.5, 0.0, -INF]), st.sampled_from([0.5, 0.0, 0.25, 1.0]), st.integers(0, 60)),
    st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
    st.integers(0, 10**6),
)
def test_any_scene(
    count: int,
    image_size: tuple[int, int],
    mask_size: tuple[int, int],
    rule: Any,
    thresholds: tuple[float, float, int],
    labels: torch.dtype,
    seed: int,
) -> None:
    random = generator(seed)
    masks = torch.rand(count, *mask_size, generator=random).round()
    boxes = random_boxes(count, image_size, seed)
    strange = torch.rand(count, generator=random) < 0.1
    boxes[strange] = DEGENERATE_BOXES[torch.randint(0, 12, (int(strange.sum()),), generator=random)]
    # Few distinct values, so that there are equal scores.
    scores = torch.randint(0, 11, (count,), generator=random) / 10
    scores[torch.rand(count, generator=random) < 0.05] = NAN
    semantic = torch.randint(0, 5, image_size, generator=random).sort(dim=1).values.to(labels)
    panoptic, segments = panoptic_merge(
        masks,
        boxes,
        scores,
        torch.arange(count) + 7,
        semantic,
        image_size,
        score_threshold=thresholds[0],
        overlap_threshold=thresholds[1],
        stuff_area_threshold=thresholds[2],
        rule=rule,
    )
    pasted = paste_masks(masks, boxes, image_size)
    expected, rows = merge_by_pixels(pasted, scores.tolist(), semantic, rule, thresholds)
    assert np.array_equal(panoptic.numpy(), expected)
    found = [
        (instance if isthing else -label, area)
        for isthing, label, area, instance in zip(
            *(
                column.tolist()
                for column in (segments.isthing, segments.label, segments.area, segments.instance)
            ),
            strict=True,
        )
    ]
    assert found == rows


def test_reference_has_the_same_parameters() -> None:
    names = list(inspect.signature(panoptic_merge).parameters)
    assert names == list(inspect.signature(reference.panoptic_merge).parameters)


ARGUMENTS: dict[str, Any] = {
    "masks": torch.zeros(3, 28, 28),
    "boxes": torch.zeros(3, 4),
    "scores": torch.zeros(3),
    "classes": torch.zeros(3, dtype=torch.int64),
    "semantic": torch.zeros(8, 9, dtype=torch.uint8),
    "image_size": (8, 9),
}


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("masks", None, TypeError),
        ("masks", torch.zeros(3, 28, 28, dtype=torch.int64), TypeError),
        ("masks", torch.zeros(3, 28), ValueError),
        ("masks", torch.zeros(3, 2, 28, 28), ValueError),
        ("boxes", torch.zeros(2, 4), ValueError),
        ("boxes", torch.zeros(3, 5), ValueError),
        ("boxes", torch.zeros(3, 4, dtype=torch.int64), TypeError),
        ("scores", torch.zeros(2), ValueError),
        ("scores", torch.zeros(3, 1), ValueError),
        ("scores", torch.zeros(3, dtype=torch.int64), TypeError),
        ("classes", torch.zeros(2, dtype=torch.int64), ValueError),
        ("classes", torch.zeros(3), TypeError),
        ("semantic", torch.zeros(9, 8, dtype=torch.uint8), ValueError),
        ("semantic", torch.zeros(1, 8, 9, dtype=torch.uint8), ValueError),
        ("semantic", torch.zeros(8, 9), TypeError),
        ("semantic", torch.zeros(8, 9, dtype=torch.bool), TypeError),
        ("image_size", (8.0, 9.0), TypeError),
        ("image_size", 8, TypeError),
        ("image_size", (8, 9, 1), ValueError),
        ("image_size", (-8, 9), ValueError),
        ("score_threshold", "0.5", TypeError),
        ("overlap_threshold", None, TypeError),
        ("overlap_threshold", NAN, ValueError),
        ("stuff_area_threshold", 0.5, TypeError),
        ("mask_threshold", "0.5", TypeError),
        ("rule", "mmdetection2", ValueError),
        ("rule", None, ValueError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        panoptic_merge(**{**ARGUMENTS, argument: value})

"""The reference implementations against independent ones: definitions written as loops, and other libraries."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panfpn_fast.ops import reference
from support.head_oracles import Box, iou
from support.op_samples import (
    DEGENERATE_BOXES,
    generator,
    random_boxes,
    random_features,
    random_masks,
    random_rois,
)


def bilinear(plane: list[list[float]], y: float, x: float) -> float:
    """Returns the bilinear sample at (y, x) by the rules of ROIAlign."""
    height, width = len(plane), len(plane[0])
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    fy, fx = y - top, x - left
    upper = plane[top][left] * (1 - fx) + plane[top][right] * fx
    lower = plane[bottom][left] * (1 - fx) + plane[bottom][right] * fx
    return upper * (1 - fy) + lower * fy


def roi_align_by_loops(
    features: Tensor, roi: list[float], pooled: int, scale: float, sampling_ratio: int, aligned: bool
) -> list[list[float]]:
    """Pools one box of one channel, sample by sample."""
    plane = features[int(roi[0]), 0].tolist()
    offset = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (coordinate * scale - offset for coordinate in roi[1:])
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    bin_h, bin_w = height / pooled, width / pooled
    grid_h = sampling_ratio if sampling_ratio > 0 else max(math.ceil(bin_h), 0)
    grid_w = sampling_ratio if sampling_ratio > 0 else max(math.ceil(bin_w), 0)
    rows = []
    for i in range(pooled):
        row = []
        for j in range(pooled):
            total = 0.0
            for sy in range(grid_h):
                for sx in range(grid_w):
                    y = y1 + i * bin_h + (sy + 0.5) * bin_h / grid_h
                    x = x1 + j * bin_w + (sx + 0.5) * bin_w / grid_w
                    total += bilinear(plane, y, x)
            row.append(total / max(grid_h * grid_w, 1))
        rows.append(row)
    return rows


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
def test_roi_align_by_loops(sampling_ratio: int, aligned: bool) -> None:
    features = random_features((2, 1, 11, 9), 0).double()
    rois = torch.cat(
        [random_rois(12, 2, (44, 36), 1), torch.tensor([[0.0, 3, 4, 3, 9], [1.0, 20, 20, 4, 8]])]
    ).double()
    pooled = reference.roi_align(features, rois, 3, 0.25, sampling_ratio, aligned)
    expected = [roi_align_by_loops(features, roi, 3, 0.25, sampling_ratio, aligned) for roi in rois.tolist()]
    torch.testing.assert_close(
        pooled[:, 0], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_of_a_linear_map_is_its_value_at_the_middle_of_the_bin(sampling_ratio: int) -> None:
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    features = (3 * y - 2 * x).double()[None, None]
    boxes = torch.tensor([[4.0, 5.0, 25.0, 12.0], [10.3, 20.1, 38.2, 33.7]], dtype=torch.float64)
    pooled = reference.roi_align(features, [boxes], 7, 1.0, sampling_ratio, True)
    middle = (torch.arange(7).double() + 0.5) / 7
    across = boxes[:, 0, None] + middle * (boxes[:, 2] - boxes[:, 0])[:, None] - 0.5
    down = boxes[:, 1, None] + middle * (boxes[:, 3] - boxes[:, 1])[:, None] - 0.5
    torch.testing.assert_close(pooled[:, 0], 3 * down[:, :, None] - 2 * across[:, None, :])


def test_roi_align_lists_a_long_grid_only_near_the_map() -> None:
    # Both boxes have more samples per bin than the reference lists in full; the loops can still visit them along one
    # axis.
    features = random_features((1, 1, 6, 5), 0).double()
    rois = [[0.0, 1.0, -5000.0, 4.0, 9000.0], [0.0, -20000.0, 2.0, 300.0, 4.0]]
    pooled = reference.roi_align(features, torch.tensor(rois, dtype=torch.float64), 2, 1.0, 0, True)
    expected = [roi_align_by_loops(features, roi, 2, 1.0, 0, True) for roi in rois]
    torch.testing.assert_close(
        pooled[:, 0], torch.tensor(expected, dtype=torch.float64), atol=1e-14, rtol=1e-9
    )


def test_roi_align_of_degenerate_boxes_is_finite() -> None:
    rois = F.pad(DEGENERATE_BOXES, (1, 0))
    for sampling_ratio in (0, 2):
        for aligned in (False, True):
            pooled = reference.roi_align(torch.ones(1, 2, 6, 5), rois, 3, 1.0, sampling_ratio, aligned)
            assert pooled.isfinite().all()
            assert pooled.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_gradient(sampling_ratio: int, aligned: bool) -> None:
    features = random_features((2, 2, 6, 7), 0).double().requires_grad_()
    rois = random_rois(4, 2, (6, 7), 0)
    assert torch.autograd.gradcheck(
        lambda x: reference.roi_align(x, rois, 2, 1.0, sampling_ratio, aligned), features, fast_mode=True
    )
    nothing = reference.roi_align(features, rois[:0], 2)
    assert torch.equal(torch.autograd.grad(nothing.sum(), features)[0], torch.zeros_like(features))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roi_align_equals_torchvision(
    dtype: torch.dtype, sampling_ratio: int, aligned: bool, device: torch.device, torchvision_ops: ModuleType
) -> None:
    features = random_features((2, 4, 17, 21), 0).to(device, dtype)
    rois = random_rois(50, 2, (68, 84), 0).to(device, dtype)
    args: tuple[Any, ...] = (features, rois, (5, 7), 0.25, sampling_ratio, aligned)
    actual, expected = reference.roi_align(*args), torchvision_ops.roi_align(*args)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("side", [1.0, 30.0, 111.9, 112.0, 200.0, 224.0, 447.0, 448.0, 900.0, 5000.0])
def test_multiscale_roi_align_pools_from_the_level_of_the_formula(side: float) -> None:
    scales = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    level = min(max(math.floor(4 + math.log2(side / 224 + 1e-8)), 2), 5)
    features = [random_features((1, 3, 30, 30), seed) for seed in range(4)]
    boxes = [torch.tensor([[7.0, 9.0, 7.0 + side, 9.0 + side]])]
    pooled = reference.multiscale_roi_align(features, boxes, 3, scales)
    expected = reference.roi_align(features[level - 2], boxes, 3, scales[level - 2], 0, True)
    assert torch.equal(pooled, expected)


def test_multiscale_roi_align_gradient() -> None:
    features = [random_features((1, 2, size, size), size).double().requires_grad_() for size in (16, 8, 4)]
    sides = torch.tensor([[8.0], [20.0], [60.0]])
    boxes = [torch.cat([sides * 0 + 2, sides * 0 + 3, sides, sides], dim=1)]
    assert torch.autograd.gradcheck(
        lambda *maps: reference.multiscale_roi_align(
            maps, boxes, 2, (1 / 4, 1 / 8, 1 / 16), canonical_box_size=16, canonical_level=3
        ),
        features,
        fast_mode=True,
    )


def nms_by_loops(boxes: list[Box], scores: list[float], groups: list[int], threshold: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(groups[i] != groups[k] or iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


@settings(max_examples=60, deadline=None)
@given(
    # Corner, size, score in tenths, and group of each box.
    st.lists(
        st.tuples(*[st.integers(0, 9)] * 2, *[st.integers(1, 9)] * 2, st.integers(0, 3), st.integers(0, 2))
    ),
    st.sampled_from([0.0, 0.11, 0.25, 0.5, 0.7]),
)
def test_nms_by_loops(rows: list[tuple[int, ...]], threshold: float) -> None:
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    boxes = torch.cat([table[:, :2], table[:, :2] + table[:, 2:4]], dim=1)
    scores, groups = table[:, 4], table[:, 5].long()
    one_group = [0] * len(rows)
    expected = nms_by_loops(boxes.tolist(), scores.tolist(), one_group, threshold)
    assert reference.nms(boxes, scores, threshold).tolist() == expected
    expected = nms_by_loops(boxes.tolist(), scores.tolist(), groups.tolist(), threshold)
    # Moving small integers needs no rounding, so both modes are exact.
    for exact in ("class", "torchvision"):
        assert reference.batched_nms(boxes, scores, groups, threshold, exact).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_nms_equals_torchvision(seed: int, torchvision_ops: ModuleType, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the reference follows torchvision's CPU rule for ties")
    boxes = torch.randint(0, 40, (300, 4), generator=generator(seed)).float()
    boxes[7, 2], boxes[8, 0], boxes[9] = float("nan"), float("inf"), boxes[10]
    scores = torch.randint(0, 99, (300,), generator=generator(seed)) / 99 + torch.arange(300) * 1e-6
    idxs = torch.randint(0, 5, (300,), generator=generator(seed))
    for threshold in (-1.0, 0.1, 0.3, 0.5, 0.6, 0.7):
        assert torch.equal(
            reference.nms(boxes, scores, threshold), torchvision_ops.nms(boxes, scores, threshold)
        )
        finite = torch.nan_to_num(boxes, nan=3.0, posinf=50.0)
        expected = torchvision_ops.batched_nms(finite, scores, idxs, threshold)
        assert torch.equal(reference.batched_nms(finite, scores, idxs, threshold, "torchvision"), expected)


def paste_by_grid_sample(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Computes the values that detectron2 thresholds with F.grid_sample: [N, height, width]."""
    height, width = image_size
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    y = (torch.arange(height, dtype=boxes.dtype) + 0.5 - y1) / (y2 - y1) * 2 - 1
    x = (torch.arange(width, dtype=boxes.dtype) + 0.5 - x1) / (x2 - x1) * 2 - 1
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paste_masks_by_grid_sample(dtype: torch.dtype) -> None:
    image_size = (50, 71)
    masks = random_masks(6, 28, 21, 0).to(dtype)
    boxes = random_boxes(6, image_size, 0).to(dtype)
    boxes[5] = boxes[5][[2, 1, 0, 3]]
    expected = paste_by_grid_sample(masks, boxes, image_size)
    for threshold in (0.0, 0.3, 0.5, 1.0):
        different = reference.paste_masks(masks, boxes, image_size, threshold) != (expected >= threshold)
        assert not (different & ((expected - threshold).abs() > 1e-6)).any()
    values = reference.paste_masks(masks, boxes, image_size, -1.0)
    assert ((values.to(dtype) - (expected * 255).floor()).abs() <= 1).all()


def merge_by_sets(
    pasted: Tensor, scores: Tensor, classes: Tensor, semantic: Tensor, overlap: float, stuff_area: int
) -> tuple[Tensor, list[tuple[int, bool, int, int, int]]]:
    """Applies detectron2's rules to sets of pixels, for distinct scores of at least 0.5."""
    panoptic = torch.zeros_like(semantic, dtype=torch.int32)
    taken: set[int] = set()
    segments: list[tuple[int, bool, int, int, int]] = []

    def add(isthing: bool, label: int, pixels: set[int], instance: int) -> None:
        segments.append((len(segments) + 1, isthing, label, len(pixels), instance))
        panoptic.view(-1)[sorted(pixels)] = len(segments)
        taken.update(pixels)

    for i in sorted(range(len(scores)), key=lambda i: -float(scores[i])):
        pixels = set(torch.nonzero(pasted[i].flatten())[:, 0].tolist())
        free = pixels - taken
        if free and (len(pixels) - len(free)) / len(pixels) <= overlap:
            add(True, int(classes[i]), free, i)
    for label in range(1, 7):
        free = set(torch.nonzero(semantic.flatten() == label)[:, 0].tolist()) - taken
        if free and len(free) >= stuff_area:
            add(False, label, free, -1)
    return panoptic, segments


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("overlap", "stuff_area"), [(0.5, 100), (0.2, 1)])
def test_panoptic_merge_by_sets(seed: int, overlap: float, stuff_area: int) -> None:
    image_size = (40, 56)
    masks, boxes = random_masks(9, 14, 14, seed), random_boxes(9, image_size, seed)
    scores = torch.linspace(0.5, 0.9, 9)[torch.randperm(9, generator=generator(seed))]
    classes = torch.arange(9) + 20
    semantic = (
        torch.randint(0, 7, (5, 7), generator=generator(seed)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    )
    panoptic, segments = reference.panoptic_merge(
        masks,
        boxes,
        scores,
        classes,
        semantic,
        image_size,
        overlap_threshold=overlap,
        stuff_area_threshold=stuff_area,
    )
    pasted = reference.paste_masks(masks, boxes, image_size)
    expected, rows = merge_by_sets(pasted, scores, classes, semantic, overlap, stuff_area)
    assert torch.equal(panoptic, expected)
    columns = (segments.id, segments.isthing, segments.label, segments.area, segments.instance)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == rows
    things = segments.instance[segments.isthing]
    assert torch.equal(segments.score[segments.isthing], scores[things])
    assert segments.score[~segments.isthing].eq(0).all()

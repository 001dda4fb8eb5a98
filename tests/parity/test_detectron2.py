"""Outputs equal those of detectron2 0.6 with the same weights, and those of the same network in float64.

There is a golden file for R-50 at short edge 480. R-101 and the full size of 800/1333 are compared with the same
network in float64, which uses different ops: the references in plain PyTorch, and pooling by grid_sample, because the
reference of ROIAlign would take minutes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from panfpn_fast import ops
from panfpn_fast.checkpoints import load
from panfpn_fast.data.images import read_image, resize_shortest_edge
from panfpn_fast.models import PanopticFPN, PanopticOutput
from panfpn_fast.ops import reference
from support.checkpoint_samples import save_pickle, save_torch, seeded_weights, shared_folder
from support.numpy_panoptic_quality import Quality, panoptic_quality

CASE = "detectron2_r50"
PHOTOGRAPHS = ("000000142238", "000000439180")

# Limits. With another convolution algorithm, detectron2 itself reaches a quality of 0.9997. The limit of 0.995 leaves
# room for other hardware. Mistakes in the semantics give at most 0.98, and mostly less than 0.6.
LEAST_QUALITY = 0.995
BOX_PIXELS = 0.5
SCORE = 1e-3
LEAST_BOXES = 0.99
LEAST_EQUAL_LABELS = 0.999
FEATURES = 1e-3
MASK_AREA = 0.01  # relative to the area, and 2 pixels more for small masks

Features = dict[str, npt.NDArray[Any]]


class Result(NamedTuple):
    """One of the two results that are compared."""

    panoptic: npt.NDArray[Any]
    categories: dict[int, tuple[bool, int]]  # id -> (isthing, class)
    boxes: npt.NDArray[Any]
    scores: npt.NDArray[Any]
    classes: npt.NDArray[Any]
    mask_areas: npt.NDArray[Any]
    semantic: npt.NDArray[Any]
    features: Features


def _features(pyramid: list[torch.Tensor]) -> Features:
    features: Features = {}
    for level, p in enumerate(pyramid, start=2):
        features[f"feature_p{level}_mean"] = p[0].mean(dim=(1, 2)).numpy()
        features[f"feature_p{level}_std"] = p[0].std(dim=(1, 2), correction=0).numpy()
        features[f"feature_p{level}_corner"] = p[0, :8, :6, :6].numpy()
    return features


def _predict(
    model: PanopticFPN,
    photograph: npt.NDArray[np.uint8],
    short_edge: int,
    max_edge: int,
    paste: Callable[..., torch.Tensor],
) -> Result:
    """Runs the network, and records the features of the same run."""
    kept: list[torch.Tensor] = []
    handle = model.fpn.register_forward_hook(lambda module, args, pyramid: kept.extend(pyramid))
    resized = torch.from_numpy(resize_shortest_edge(photograph, short_edge, max_edge)).permute(2, 0, 1)
    size = photograph.shape[:2]
    output: PanopticOutput
    [output] = model([resized], [(size[0], size[1])])
    handle.remove()
    segments = output.segments
    rows = zip(segments.id.tolist(), segments.isthing.tolist(), segments.label.tolist(), strict=True)
    return Result(
        panoptic=output.panoptic.numpy(),
        categories={i: (isthing, label) for i, isthing, label in rows},
        boxes=output.boxes.numpy(),
        scores=output.scores.numpy(),
        classes=output.classes.numpy(),
        mask_areas=paste(output.mask_probs, output.boxes, size).sum(dim=(1, 2)).numpy(),
        semantic=output.semantic.numpy(),
        features=_features(kept),
    )


def _golden(name: str) -> tuple[Result, dict[str, Any], npt.NDArray[np.uint8]]:
    folder = shared_folder()
    path = folder / "goldens" / CASE / f"{name}_480"
    about = json.loads(path.with_suffix(".json").read_text())
    arrays = np.load(path.with_suffix(".npz"))
    result = Result(
        panoptic=arrays["panoptic"],
        categories={s["id"]: (s["isthing"], s["category_id"]) for s in about["segments_info"]},
        boxes=arrays["boxes"],
        scores=arrays["scores"],
        classes=arrays["classes"],
        mask_areas=arrays["mask_areas"],
        semantic=arrays["semantic_argmax"],
        features={key: arrays[key] for key in arrays.files if key.startswith("feature_")},
    )
    return result, about, read_image(folder / about["image"])


class Figures(NamedTuple):
    """How closely two results agree."""

    quality: Quality
    reverse_quality: Quality
    boxes: int  # matched within the limits
    of_boxes: int
    box_pixels: float  # largest difference of matched boxes
    score: float
    mask_area: float  # largest relative difference of matched boxes, after 2 pixels are subtracted
    equal_labels: float
    features: float  # largest relative difference
    pixels: int  # pixels of the panoptic map that differ in (isthing, class)

    def __str__(self) -> str:
        return (
            f"panoptic quality {self.quality.pq:.6f} / {self.reverse_quality.pq:.6f} over "
            f"{self.quality.true_positives} segments, {self.pixels} pixels of another class; "
            f"boxes {self.boxes}/{self.of_boxes}, worst {self.box_pixels:.1e} px, score {self.score:.1e}, "
            f"mask area {self.mask_area:.1e}; semantic labels equal {self.equal_labels:.6f}; "
            f"features {self.features:.1e}"
        )


def _compare(expected: Result, got: Result) -> Figures:
    free = set(range(len(got.boxes)))
    boxes, box_pixels, score, mask_area = 0, 0.0, 0.0, 0.0
    for i, box in enumerate(expected.boxes):
        distances = np.abs(got.boxes - box).max(axis=1)
        scores = np.abs(got.scores - expected.scores[i])
        same = (got.classes == expected.classes[i]) & (distances <= BOX_PIXELS) & (scores <= SCORE)
        match = min((j for j in free if same[j]), key=lambda j: float(distances[j]), default=None)
        if match is None:
            continue
        free.remove(match)
        boxes += 1
        box_pixels = max(box_pixels, float(distances[match]))
        score = max(score, float(scores[match]))
        area = int(expected.mask_areas[i])
        difference = max(abs(int(got.mask_areas[match]) - area) - 2, 0)
        mask_area = max(mask_area, difference / max(area, 1))
    features = max(
        float(np.abs(got.features[key] - value).max() / np.abs(value).max())
        for key, value in expected.features.items()
    )
    return Figures(
        quality=panoptic_quality(expected.panoptic, expected.categories, got.panoptic, got.categories),
        reverse_quality=panoptic_quality(
            got.panoptic, got.categories, expected.panoptic, expected.categories
        ),
        boxes=boxes,
        of_boxes=max(len(expected.boxes), len(got.boxes)),
        box_pixels=box_pixels,
        score=score,
        mask_area=mask_area,
        equal_labels=float((expected.semantic == got.semantic).mean()),
        features=features,
        pixels=int((_classes(expected) != _classes(got)).any(axis=-1).sum()),
    )


def _classes(result: Result) -> npt.NDArray[np.int64]:
    """Returns (isthing, class) of each pixel, [H, W, 2]; (-1, -1) for void."""
    table = np.full((max(result.categories, default=0) + 1, 2), -1)
    for i, category in result.categories.items():
        table[i] = category
    return table[result.panoptic.astype(np.int64)]


def _hold(figures: Figures) -> None:
    assert figures.quality.pq >= LEAST_QUALITY
    assert figures.reverse_quality.pq >= LEAST_QUALITY
    assert figures.of_boxes == 100
    assert figures.boxes >= LEAST_BOXES * figures.of_boxes
    assert figures.mask_area <= MASK_AREA
    assert figures.equal_labels >= LEAST_EQUAL_LABELS
    assert figures.features <= FEATURES


def _pool_by_grid_sample(
    features: list[torch.Tensor],
    boxes: list[torch.Tensor],
    output_size: int,
    spatial_scales: list[float],
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """Computes multiscale_roi_align for boxes inside the image, where grid_sample only needs to clamp to the border."""
    assert (sampling_ratio, aligned) == (0, True)
    images = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
    rois = torch.cat(boxes)
    areas = (rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])
    levels = (areas.sqrt() / 224 + 1e-8).log2().floor().long().clamp(-2, 1) + 2
    rois = rois * torch.tensor(spatial_scales, dtype=rois.dtype)[levels, None] - 0.5
    sizes = rois[:, 2:] - rois[:, :2]
    counts = (sizes / output_size).ceil().long()  # samples per bin, x and y
    pooled = rois.new_zeros(len(rois), features[0].shape[1], output_size, output_size)
    # Boxes with the same image, level and numbers of samples are pooled together.
    keys = torch.stack((images, levels, counts[:, 0], counts[:, 1]), dim=1)
    for key in torch.unique(keys, dim=0):
        members = (keys == key).all(dim=1).nonzero()[:, 0]
        image, level, nx, ny = key.tolist()
        if nx == 0 or ny == 0:
            continue
        feature = features[level][image]
        height, width = feature.shape[1:]
        x, y = (
            (
                rois[members, axis, None]
                + (torch.arange(n, dtype=rois.dtype) + 0.5) / n * sizes[members, axis, None]
            )
            / (side - 1)
            * 2
            - 1
            for axis, n, side in ((0, nx * output_size, width), (1, ny * output_size, height))
        )
        shape = (len(members), y.shape[1], x.shape[1])
        grid = torch.stack((x[:, None, :].expand(shape), y[:, :, None].expand(shape)), dim=-1)
        samples = F.grid_sample(
            feature[None], grid.flatten(0, 1)[None], padding_mode="border", align_corners=True
        )
        bins = F.avg_pool2d(samples[0].reshape(-1, *shape), (ny, nx))  # [C, M, s, s]
        pooled[members] = bins.transpose(0, 1)
    return pooled


@pytest.fixture(scope="module")
def r50(tmp_path_factory: pytest.TempPathFactory) -> PanopticFPN:
    path = tmp_path_factory.mktemp("r50") / "model_final.pth"
    return load(save_torch(path, seeded_weights(CASE)))


@pytest.fixture(scope="module")
def r101(tmp_path_factory: pytest.TempPathFactory) -> PanopticFPN:
    path: Path = tmp_path_factory.mktemp("r101") / "model_final.pkl"
    weights = seeded_weights(CASE, deeper=True)
    return load(save_pickle(path, {"model": weights, "__author__": "golden"}))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_r50_equals_detectron2(
    name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, about, photograph = _golden(name)
    model: PanopticFPN = request.getfixturevalue("r50")
    got = _predict(model, photograph, about["short_edge"], about["max_edge"], ops.paste_masks)
    assert got.panoptic.shape == got.semantic.shape == (about["height"], about["width"])
    figures = _compare(expected, got)
    with capsys.disabled():
        print(f"\nR-50 against detectron2, {name} at 480/800: {figures}")
    _hold(figures)


@pytest.mark.parametrize(
    ("network", "name", "short_edge", "max_edge"),
    [("r101", PHOTOGRAPHS[1], 480, 800), ("r50", PHOTOGRAPHS[0], 800, 1333)],
)
def test_float32_equals_float64_on_other_ops(
    network: str,
    name: str,
    short_edge: int,
    max_edge: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photograph = read_image(shared_folder() / "coco_sample" / "images" / f"{name}.jpg")
    model: PanopticFPN = request.getfixturevalue(network)
    start = time.perf_counter()
    got = _predict(model, photograph, short_edge, max_edge, ops.paste_masks)
    float32_seconds = time.perf_counter() - start
    monkeypatch.setattr(ops, "multiscale_roi_align", _pool_by_grid_sample)
    monkeypatch.setattr(ops, "batched_nms", reference.batched_nms)
    monkeypatch.setattr(ops, "panoptic_merge", reference.panoptic_merge)
    start = time.perf_counter()
    try:
        expected = _predict(model.double(), photograph, short_edge, max_edge, reference.paste_masks)
    finally:
        model.float()
    float64_seconds = time.perf_counter() - start
    assert len(expected.categories) > 10
    figures = _compare(expected, got)
    with capsys.disabled():
        print(
            f"\n{network} against itself in float64, {name} at {short_edge}/{max_edge} "
            f"({float32_seconds:.0f} s and {float64_seconds:.0f} s): {figures}"
        )
    _hold(figures)

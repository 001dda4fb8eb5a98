"""Outputs equal those of mmdetection 3.3.0 with the same weights, for R-50 at scale (800, 480)."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

from panfpn_fast import ops
from panfpn_fast.checkpoints import load
from panfpn_fast.data.images import read_image, resize_shortest_edge
from panfpn_fast.models import PanopticFPN, PanopticOutput
from support.checkpoint_samples import save_mmdetection, seeded_weights, shared_folder
from support.numpy_panoptic_quality import panoptic_quality

CASE = "mmdetection_r50"

# Limits. Without mkldnn, mmdetection itself differs by 4e-5 in features, 7e-5 in logits, 8e-6 in scores, 3e-4 pixels in
# boxes, 4e-4 in mask probabilities (stored as float16), 1e-6 in panoptic quality and one pixel. Any mistake in the
# semantics that shows in the photographs changes panoptic quality by 0.002 or more.
FEATURES = 1e-4
FEATURE_MEANS = 1e-5
LOGITS = 2e-4
SCORES = 5e-5
BOX_PIXELS = 2e-3
MASK_PROBS = 1e-3
LEAST_QUALITY = 0.999
MOST_PIXELS = 20
PROPOSAL_PIXELS = 0.01


class Run(NamedTuple):
    """The output of the network and its intermediate tensors."""

    output: PanopticOutput
    batch: torch.Tensor
    pyramid: list[torch.Tensor]
    logits: torch.Tensor
    proposals: torch.Tensor


def _run(model: PanopticFPN, resized: npt.NDArray[np.uint8], size: tuple[int, int]) -> Run:
    seen: dict[str, Any] = {}
    handles = [
        model.backbone.register_forward_pre_hook(lambda module, args: seen.update(batch=args[0])),
        model.fpn.register_forward_hook(lambda module, args, result: seen.update(pyramid=result)),
        model.semantic_head.register_forward_hook(lambda module, args, result: seen.update(logits=result)),
        model.box_head.register_forward_pre_hook(lambda module, args: seen.update(proposals=args[1][0])),
    ]
    image = torch.from_numpy(resized).permute(2, 0, 1)
    [output] = model([image], [size])
    for handle in handles:
        handle.remove()
    return Run(output, **seen)


def _difference(got: torch.Tensor, expected: npt.NDArray[Any]) -> float:
    assert tuple(got.shape) == expected.shape
    return float((got.double() - torch.from_numpy(expected).double()).abs().max())


def _ids(label_map: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], dict[int, tuple[bool, int]]]:
    """Converts mmdetection's map to ids from 1 and returns them with the (isthing, class) of each id.

    mmdetection's values are label + 1000 * instance; 133 is void.
    """
    values = [int(v) for v in np.unique(label_map) if v != 133]
    ids = np.zeros(label_map.shape, np.int64)
    categories = {}
    for i, value in enumerate(values, start=1):
        ids[label_map == value] = i
        label = value % 1000
        categories[i] = (True, label) if label < 80 else (False, label - 80)
    return ids, categories


def _label_map(output: PanopticOutput) -> npt.NDArray[np.int64]:
    """Converts our panoptic map to mmdetection's. The number of an instance is its position in the merging order."""
    segments = output.segments
    values = [133]
    for i, isthing, label in zip(
        segments.id.tolist(), segments.isthing.tolist(), segments.label.tolist(), strict=True
    ):
        values.append(label + 1000 * i if isthing else 79 + label)
    return np.array(values, np.int64)[output.panoptic.numpy()]


@pytest.fixture(scope="module")
def r50(tmp_path_factory: pytest.TempPathFactory) -> PanopticFPN:
    path = tmp_path_factory.mktemp("r50") / "epoch_12.pth"
    return load(save_mmdetection(path, seeded_weights(CASE)))


@pytest.mark.parametrize("name", ["000000142238", "000000439180"])
def test_r50_equals_mmdetection(name: str, r50: PanopticFPN, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared_folder()
    path = folder / "goldens" / CASE / f"{name}_480"
    about = json.loads(path.with_suffix(".json").read_text())
    golden = np.load(path.with_suffix(".npz"))
    photograph = read_image(folder / about["image"])
    long_edge, short_edge = about["resize"]["scale"]
    resized = resize_shortest_edge(photograph, short_edge, long_edge, r50.config.resize)
    assert hashlib.sha256(resized.tobytes()).hexdigest() == about["resize"]["sha256_rgb"]

    size = (about["height"], about["width"])
    output, batch, pyramid, logits, proposals = _run(r50, resized, size)
    assert tuple(batch.shape[2:]) == (about["padded_height"], about["padded_width"])
    assert _difference(batch[0, :, :6, :6], golden["batch_corner"]) < 1e-6
    figures: dict[str, float] = {"features": 0.0, "feature means": 0.0}
    for level, p in enumerate(pyramid, start=2):
        means = _difference(p[0].mean(dim=(1, 2)), golden[f"feature_p{level}_mean"])
        others = (
            _difference(p[0].std(dim=(1, 2), correction=0), golden[f"feature_p{level}_std"]),
            _difference(p[0, :8, :6, :6], golden[f"feature_p{level}_corner"]),
        )
        figures["feature means"] = max(figures["feature means"], means)
        figures["features"] = max(figures["features"], *others)
    # mmdetection's channel 53, things, is our channel 0.
    figures["logits"] = _difference(logits[0, :, ::4, ::4].roll(-1, 0), golden["semantic_logits_stride4"])
    distances = torch.cdist(torch.from_numpy(golden["proposals"]), proposals, p=float("inf"))
    figures["proposals"] = float(distances.min(dim=1).values.max())
    assert output.classes.tolist() == golden["classes"].tolist()
    figures["scores"] = _difference(output.scores, golden["scores"])
    figures["boxes"] = _difference(output.boxes, golden["boxes"])
    figures["mask probabilities"] = _difference(output.mask_probs, golden["mask_probs"])
    areas = ops.paste_masks(output.mask_probs, output.boxes, size).sum(dim=(1, 2))
    figures["mask areas"] = _difference(areas, golden["mask_areas"])
    labels = (output.semantic.numpy().astype(np.int64) - 1) % 54
    figures["semantic pixels"] = float((labels != golden["semantic_argmax"]).sum())
    mine = _label_map(output)
    figures["panoptic pixels"] = float((mine != golden["panoptic"]).sum())
    quality = panoptic_quality(*_ids(golden["panoptic"]), *_ids(mine))
    with capsys.disabled():
        print(
            f"\nR-50 against mmdetection, {name}: panoptic quality {quality.pq:.6f}, differences: {figures}"
        )

    assert figures["features"] <= FEATURES
    assert figures["feature means"] <= FEATURE_MEANS
    assert figures["logits"] <= LOGITS
    assert figures["proposals"] <= PROPOSAL_PIXELS
    assert figures["scores"] <= SCORES
    assert figures["boxes"] <= BOX_PIXELS
    assert figures["mask probabilities"] <= MASK_PROBS
    assert figures["mask areas"] <= 2
    assert figures["semantic pixels"] <= MOST_PIXELS
    assert figures["panoptic pixels"] <= MOST_PIXELS
    assert quality.pq >= LEAST_QUALITY

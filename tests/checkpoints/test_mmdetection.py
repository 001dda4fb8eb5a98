"""mmdetection's checkpoints: recognised by content, set up as mmdetection runs them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_samples import (
    SMALL,
    Weights,
    save_mmdetection,
    save_pickle,
    small_mmdetection_weights,
    small_network,
)

from panfpn_fast.checkpoints import CheckpointError, load, mmdetection
from panfpn_fast.models import PanopticFPN
from panfpn_fast.training.initialize import initialize

# mmdetection 3.3.0, configs/panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py and what it inherits.
AS_THERE: dict[str, Any] = {
    "stride_in_1x1": False,
    "channel_order": "RGB",
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
    "resize": "mmdetection",
    "rpn_ranking": "probability",
    "clamp_shrinking": True,
    "score_threshold": 0.6,
    "class_agnostic_nms": True,
    "fusion_rule": "mmdetection",
    "instance_score_threshold": 0.0,
}


@pytest.fixture
def weights() -> Weights:
    return small_mmdetection_weights()


def _assert_equal(model: PanopticFPN, original: PanopticFPN) -> None:
    state, expected = model.state_dict(), original.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_load(tmp_path: Path, weights: Weights) -> None:
    path = save_mmdetection(tmp_path / "epoch_12.pth", weights, CLASSES=("person",), epoch=12)
    model = load(path)
    _assert_equal(model, small_network())
    assert model.config == small_network().config.replace(**AS_THERE)
    [output] = model([torch.zeros(3, 40, 60, dtype=torch.uint8)])
    assert output.panoptic.shape == (40, 60)
    assert load(path, stride_in_1x1=True, score_threshold=0.05).config == model.config.replace(
        stride_in_1x1=True, score_threshold=0.05
    )


def test_names() -> None:
    """One tensor of each rule; the golden's parity shows that all of the values go where they belong."""
    for ours, theirs in {
        "backbone.norm1.running_var": "backbone.bn1.running_var",
        "backbone.layer3.5.conv2.weight": "backbone.layer3.5.conv2.weight",
        "backbone.layer3.5.norm3.bias": "backbone.layer3.5.bn3.bias",
        "backbone.layer4.0.shortcut.conv.weight": "backbone.layer4.0.downsample.0.weight",
        "backbone.layer4.0.shortcut.norm.weight": "backbone.layer4.0.downsample.1.weight",
        "fpn.lateral.p2.bias": "neck.lateral_convs.0.conv.bias",
        "fpn.output.p5.weight": "neck.fpn_convs.3.conv.weight",
        "rpn.deltas.bias": "rpn_head.rpn_reg.bias",
        "box_head.fc2.weight": "roi_head.bbox_head.shared_fcs.1.weight",
        "mask_head.convs.3.bias": "roi_head.mask_head.convs.3.conv.bias",
        "semantic_head.levels.p5.2.conv.weight": "semantic_head.conv_upsample_layers.3.conv.2.conv.weight",
        "semantic_head.levels.p2.0.norm.bias": "semantic_head.conv_upsample_layers.0.conv.0.gn.bias",
    }.items():
        assert mmdetection.LAYOUT.key(ours) == theirs
    with pytest.raises(KeyError):
        mmdetection.LAYOUT.key("fpn.semantic.lateral.p2.bias")


def test_the_things_channel_is_last_there(tmp_path: Path, weights: Weights) -> None:
    weights["semantic_head.conv_logits.bias"] = np.arange(5, dtype=np.float32)
    model = load(save_mmdetection(tmp_path / "a.pth", weights))
    bias = model.semantic_head.logits.bias
    assert bias is not None
    assert bias.tolist() == [4, 0, 1, 2, 3]


def test_a_mask_rcnn_has_its_own_thresholds(tmp_path: Path, weights: Weights) -> None:
    alone = {name: value for name, value in weights.items() if not name.startswith("semantic_head.")}
    model = load(save_mmdetection(tmp_path / "a.pth", alone))
    assert model.config.tasks == ("instance",)
    assert (model.config.score_threshold, model.config.class_agnostic_nms) == (0.05, False)
    chosen = load(save_mmdetection(tmp_path / "b.pth", weights), tasks=("semantic",))
    assert {name.split(".")[0] for name in chosen.state_dict()} == {"backbone", "fpn", "semantic_head"}


def test_other_forms_of_the_file(tmp_path: Path, weights: Weights) -> None:
    parallel = {f"module.{name}": value for name, value in weights.items()}
    _assert_equal(load(save_mmdetection(tmp_path / "a.pth", parallel)), small_network())
    _assert_equal(load(save_pickle(tmp_path / "b.pkl", weights)), small_network())


def test_backbone_norm_that_counts_its_batches(tmp_path: Path, weights: Weights) -> None:
    model = load(save_mmdetection(tmp_path / "a.pth", weights), backbone_norm="bn")
    assert model.get_buffer("backbone.norm1.num_batches_tracked").item() == 0
    mean = model.get_buffer("backbone.norm1.running_mean")
    assert torch.equal(mean, small_network().get_buffer("backbone.norm1.running_mean"))


def test_what_does_not_fit_is_named_as_there(tmp_path: Path, weights: Weights) -> None:
    del weights["roi_head.bbox_head.shared_fcs.1.bias"]
    weights["semantic_head.conv_logits.bias"] = np.float32(0)  # type: ignore[assignment]
    weights["roi_head.grid_head.weight"] = np.zeros(2, np.float32)
    with pytest.raises(CheckpointError) as info:
        load(save_mmdetection(tmp_path / "a.pth", weights))
    lines = {line.strip() for line in str(info.value).splitlines()[1:]}
    assert lines == {
        "missing: roi_head.bbox_head.shared_fcs.1.bias [16]",
        "unexpected: roi_head.grid_head.weight [2]",
        "wrong shape: semantic_head.conv_logits.bias is [], this network needs [5]",
    }


def test_a_log_beside_the_weights_is_left_out(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmengine's checkpoints have objects of its own, with arrays in them, which nobody needs here."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history = np.arange(3.0)
            self.last = np.float64(2)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[HistoryBuffer.__module__].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    content = torch.load(save_mmdetection(tmp_path / "a.pth", weights), weights_only=True)
    torch.save({**content, "message_hub": {"log_scalars": {"loss": HistoryBuffer()}}}, tmp_path / "b.pth")
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.delitem(sys.modules, name)
    _assert_equal(load(tmp_path / "b.pth"), small_network())


def test_training_begins_with_it(tmp_path: Path, weights: Weights) -> None:
    torch.manual_seed(1)
    model = PanopticFPN(**SMALL)
    messages = initialize(model, str(save_mmdetection(tmp_path / "a.pth", weights)))
    _assert_equal(model, small_network())
    assert "warning: these weights were trained with stride_in_1x1=False, here it is True" in messages
    assert len(messages) == 1 + 5

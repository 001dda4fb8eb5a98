"""mmdetection's checkpoints are recognized by content and configured as mmdetection runs them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import panfpn_fast
from panfpn_fast.checkpoints import CheckpointError, detectron2, load, mmdetection
from panfpn_fast.data import Categories, Category, get_categories
from panfpn_fast.models import PanopticFPN
from panfpn_fast.training.initialize import initialize
from support.checkpoint_samples import (
    SMALL,
    Weights,
    save_mmdetection,
    save_pickle,
    small_mmdetection_weights,
    small_network,
)
from support.tensors import assert_same_tensors

# mmdetection 3.3.0, configs/panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py and its base files.
MMDETECTION_SETTINGS: dict[str, Any] = {
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


UNNAMED = {name: value for name, value in SMALL.items() if name not in ("num_things", "num_stuff", "tasks")}


@pytest.fixture
def weights() -> Weights:
    return small_mmdetection_weights()


def _assert_equal(model: PanopticFPN, original: PanopticFPN) -> None:
    assert_same_tensors(model.state_dict(), original.state_dict())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_load(tmp_path: Path, weights: Weights) -> None:
    path = save_mmdetection(tmp_path / "epoch_12.pth", weights, CLASSES=("person",), epoch=12)
    model = load(path)
    _assert_equal(model, small_network())
    assert model.config == small_network().config.replace(**MMDETECTION_SETTINGS)
    [output] = model([torch.zeros(3, 40, 60, dtype=torch.uint8)])
    assert output.panoptic.shape == (40, 60)
    assert load(path, stride_in_1x1=True, score_threshold=0.05).config == model.config.replace(
        stride_in_1x1=True, score_threshold=0.05
    )


def test_names() -> None:
    """One tensor per rule; the parity tests check that every tensor goes to its place."""
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


def test_the_channel_of_things_is_moved_to_the_front(tmp_path: Path, weights: Weights) -> None:
    weights["semantic_head.conv_logits.bias"] = np.arange(5, dtype=np.float32)
    model = load(save_mmdetection(tmp_path / "a.pth", weights))
    bias = model.semantic_head.logits.bias
    assert bias is not None
    assert bias.tolist() == [4, 0, 1, 2, 3]


def test_a_mask_rcnn_has_other_thresholds(tmp_path: Path, weights: Weights) -> None:
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


def test_a_backbone_norm_with_a_counter_of_batches(tmp_path: Path, weights: Weights) -> None:
    model = load(save_mmdetection(tmp_path / "a.pth", weights), backbone_norm="bn")
    assert model.get_buffer("backbone.norm1.num_batches_tracked").item() == 0
    mean = model.get_buffer("backbone.norm1.running_mean")
    assert torch.equal(mean, small_network().get_buffer("backbone.norm1.running_mean"))


def test_errors_use_the_names_of_mmdetection(tmp_path: Path, weights: Weights) -> None:
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
    """Mmengine's checkpoints contain its objects, with arrays in them, which are not loaded."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history = np.arange(3.0)
            self.last = np.float64(2)

        def mean(self) -> float:
            return float(self.history.mean())

        def __getstate__(self) -> dict[str, Any]:
            # mmengine's state has a table of methods; pickle writes a method as getattr(class, name).
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    HistoryBuffer.mean.__module__ = HistoryBuffer.__module__
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[HistoryBuffer.__module__].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    content = torch.load(save_mmdetection(tmp_path / "a.pth", weights), weights_only=True)
    torch.save({**content, "message_hub": {"log_scalars": {"loss": HistoryBuffer()}}}, tmp_path / "b.pth")
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.delitem(sys.modules, name)
    _assert_equal(load(tmp_path / "b.pth"), small_network())


def test_the_other_values_of_mmcvs_ema_hook_are_left_out(tmp_path: Path, weights: Weights) -> None:
    """The hook saves the averages under the names of the network, and what they replace as `ema_` and a flat name."""
    others = {f"ema_{name.replace('.', '_')}": np.zeros_like(value) for name, value in weights.items()}
    _assert_equal(load(save_mmdetection(tmp_path / "a.pth", {**weights, **others})), small_network())


def test_training_starts_from_it(tmp_path: Path, weights: Weights) -> None:
    torch.manual_seed(1)
    model = PanopticFPN(**SMALL)
    messages = initialize(model, str(save_mmdetection(tmp_path / "a.pth", weights)))
    _assert_equal(model, small_network())
    assert "warning: these weights were trained with stride_in_1x1=False, here it is True" in messages
    assert len(messages) == 1 + 5


@pytest.mark.parametrize("key", ["CLASSES", "classes"])
def test_names_of_a_mask_rcnn(tmp_path: Path, key: str) -> None:
    """A network with one branch has only the names of that branch."""
    for count, names, expected in (
        (2, ("cell", "crack"), ["cell", "crack"]),
        (2, ("cell",), None),
        (80, tuple(c.name for c in get_categories("coco_panoptic").things), "coco_panoptic"),
        (8, tuple(c.name for c in get_categories("cityscapes").things), "cityscapes"),
    ):
        network = PanopticFPN(**UNNAMED, tasks=("instance",), num_things=count)
        meta = {"CLASSES": names} if key == "CLASSES" else {"dataset_meta": {"classes": names}}
        weights = {name: value.numpy() for name, value in mmdetection.tensors(network).items()}
        config = load(save_mmdetection(tmp_path / "epoch_1.pth", weights, **meta)).config
        assert config.tasks == ("instance",)
        if isinstance(expected, str):
            assert config.categories == get_categories(expected)
        else:
            assert [c.name for c in config.categories.things] == (expected or ["thing 1", "thing 2"])


@pytest.mark.parametrize("framework", [detectron2, mmdetection])
def test_classes_that_the_caller_names(tmp_path: Path, framework: Any) -> None:
    """A checkpoint with one branch needs only the classes of that branch."""
    things = (Category(1, "cell", True, (0, 0, 0)), Category(2, "crack", True, (0, 0, 0)))
    stuff = (Category(3, "glass", False, (0, 0, 0)),)
    both, alone = Categories("both", things, stuff), Categories("alone", things, ())
    network = PanopticFPN(**UNNAMED, num_things=2, num_stuff=1)
    single = PanopticFPN(**UNNAMED, num_things=2, num_stuff=1, tasks=("instance",))
    key = "model" if framework is detectron2 else "state_dict"
    for model, categories in ((network, both), (single, both), (single, alone)):
        torch.save({key: framework.tensors(model)}, tmp_path / "a.pth")
        found = load(tmp_path / "a.pth", categories=categories)
        assert found.config.categories == categories
        assert found.config.tasks == model.config.tasks
        panfpn_fast.save(model, tmp_path / "b.pth")
        assert load(tmp_path / "b.pth", categories=categories).config.categories == categories
    torch.save({key: framework.tensors(network)}, tmp_path / "a.pth")
    for wrong, message in (
        (alone, "categories: expected 1 stuff classes, as many as the network has; 'alone' has 0"),
        (
            Categories("one", things[:1], stuff),
            "categories: expected 2 thing classes, as many .*; 'one' has 1",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "a.pth", categories=wrong)

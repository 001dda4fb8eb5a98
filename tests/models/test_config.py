"""Settings: what they refuse, and the presets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from panfpn_fast.models import PanopticFPN, PanopticFPNConfig, get_preset, presets


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tasks", ()),
        ("tasks", "instance"),
        ("tasks", ("semantic", "instance")),
        ("tasks", ("panoptic",)),
        ("backbone", "resnet 19"),
        ("backbone", ""),
        ("backbone", None),
        ("backbone", "torchvision:"),
        ("backbone", "keras:resnet50"),
        ("backbone", "timm:"),
        ("backbone_norm", "layer"),
        ("stride_in_1x1", "yes"),
        ("class_agnostic_boxes", None),
        ("class_agnostic_nms", "no"),
        ("clamp_shrinking", 2),
        ("resize", "opencv"),
        ("rpn_ranking", "score"),
        ("fusion_rule", "detectron"),
        ("class_agnostic_masks", 2),
        ("num_things", 0),
        ("num_things", 80.0),
        ("num_stuff", True),
        ("num_stuff", 4096),
        ("dataset", ""),
        ("pixel_mean", (1.0, 2.0)),
        ("pixel_mean", 128.0),
        ("pixel_std", (1.0, 0.0, 1.0)),
        ("pixel_std", (1.0, float("nan"), 1.0)),
        ("channel_order", "bgr"),
        ("size_divisibility", 16),
        ("fpn_groups", 3),
        ("fpn_groups", "2"),
        ("anchor_sizes", (32, 64)),
        ("anchor_ratios", ()),
        ("anchor_ratios", (1, -1)),
        ("rpn_pre_nms_topk", 0),
        ("rpn_nms_threshold", 1.5),
        ("score_threshold", float("inf")),
        ("nms_threshold", "0.5"),
        ("box_weights", (10, 10, 5)),
        ("detections_per_image", -1),
        ("semantic_channels", 100),
        ("semantic_fusion", "add"),
        ("stuff_area_threshold", -1),
        ("overlap_threshold", None),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        PanopticFPNConfig(**{field: value})
    with pytest.raises(ValueError, match=f"^{field}: "):
        PanopticFPN(**{field: value})


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"scores_threshold.*score_threshold"):
        PanopticFPNConfig().replace(scores_threshold=0.5)
    with pytest.raises(TypeError, match="scores_threshold"):
        PanopticFPN(scores_threshold=0.5)


def test_lists_become_tuples() -> None:
    assert PanopticFPNConfig(pixel_std=[1, 1, 1]) == PanopticFPNConfig()  # type: ignore[arg-type]
    assert PanopticFPNConfig(tasks=["semantic"]).tasks == ("semantic",)  # type: ignore[arg-type]
    assert hash(PanopticFPNConfig(anchor_ratios=[0.5, 1, 2])) == hash(PanopticFPNConfig())  # type: ignore[arg-type]


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PanopticFPNConfig().num_things = 3  # type: ignore[misc]


def test_an_unknown_preset_lists_those_there_are() -> None:
    for call in (get_preset, PanopticFPN.from_config):
        with pytest.raises(ValueError, match=r"panoptic_fpn_r18.*panoptic_fpn_r50, panoptic_fpn_r101"):
            call("panoptic_fpn_r18")


def test_from_config_takes_nothing_else() -> None:
    with pytest.raises(TypeError, match=r"config: .*got dict"):
        PanopticFPN.from_config({})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(presets))
def test_presets(name: str) -> None:
    config = get_preset(name)
    backbones = {"r50": "resnet50", "r101": "resnet101", "mobilenet": "torchvision:mobilenet_v3_large"}
    assert config.backbone == backbones[name.split("_")[2]]
    counts = (8, 11, "cityscapes") if "cityscapes" in name else (80, 53, "coco_panoptic")
    assert (config.num_things, config.num_stuff, config.dataset) == counts


def test_a_plain_name_is_torchvisions() -> None:
    assert PanopticFPNConfig(backbone="mobilenet_v3_large").backbone == "torchvision:mobilenet_v3_large"
    assert PanopticFPNConfig(backbone="resnet50").backbone == "resnet50"
    assert PanopticFPNConfig(backbone="timm:convnext_tiny.in12k").backbone == "timm:convnext_tiny.in12k"

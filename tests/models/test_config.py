"""Settings: invalid values and the presets."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest

from panfpn_fast.data import Categories, get_categories
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
        ("num_things", -1),
        ("num_things", 80.0),
        ("num_stuff", True),
        ("num_stuff", 4096),
        ("categories", ""),
        ("categories", "panoptic"),
        ("categories", 3),
        ("categories", {"name": "cells"}),
        ("categories", {"name": "cells", "things": [[1, "cell", True, [1, 2]]], "stuff": []}),
        ("categories", Categories("none", (), ())),
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
def test_invalid_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        PanopticFPNConfig(**{field: value})
    with pytest.raises(ValueError, match=f"^{field}: "):
        PanopticFPN(**{field: value})


def test_unknown_setting_is_named() -> None:
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


def test_classes_and_their_counts_agree() -> None:
    synthetic = get_categories("synthetic")
    assert PanopticFPNConfig(categories=synthetic) == PanopticFPNConfig(num_things=4, categories=synthetic)
    assert PanopticFPNConfig(categories="synthetic").categories is synthetic  # type: ignore[arg-type]
    assert PanopticFPNConfig(num_things=80, num_stuff=53).categories == get_categories("coco_panoptic")
    numbered = PanopticFPNConfig(num_things=2)
    assert (numbered.num_things, numbered.num_stuff) == (2, 53)
    assert numbered.categories.things[1].name == "thing 2"
    with pytest.raises(
        ValueError, match=r"^num_stuff: expected 11, as many as categories \('cityscapes'\) has, got 53"
    ):
        PanopticFPNConfig(num_stuff=53, categories="cityscapes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^num_things: expected 8, .*got 80"):
        PanopticFPN(num_things=80, categories="cityscapes")


@pytest.mark.parametrize(("counts", "task"), [((3, 0), "instance"), ((0, 3), "semantic")])
def test_a_task_without_classes_is_left_out(counts: tuple[int, int], task: str) -> None:
    things, stuff = counts
    config = PanopticFPNConfig(num_things=things, num_stuff=stuff)
    assert config.tasks == (task,)
    assert (len(config.categories.things), len(config.categories.stuff)) == counts
    assert PanopticFPNConfig().replace(categories=config.categories) == config
    assert PanopticFPNConfig(tasks=(task,), num_things=things, num_stuff=stuff) == config
    other = "semantic" if things else "instance"
    with pytest.raises(
        ValueError, match=rf"^tasks: expected \('{task}',\), because categories \('numbered'\) has no"
    ):
        config.replace(tasks=(other,))
    with pytest.raises(ValueError, match=r"^num_things, num_stuff: expected at least one class, got none"):
        PanopticFPNConfig(num_things=0, num_stuff=0)


def test_replacing_classes_and_counts() -> None:
    city = PanopticFPNConfig().replace(categories="cityscapes")
    assert (city.num_things, city.num_stuff) == (8, 11)
    assert city.replace(short_edge=1024, max_edge=2048) == get_preset("panoptic_fpn_r50_cityscapes")
    assert city.replace(num_things=8, score_threshold=0.2).categories == city.categories
    assert city.replace(num_things=9).categories.things[8].name == "thing 9"
    with pytest.raises(ValueError, match=r"^num_things: expected 8"):
        dataclasses.replace(city, num_things=9)


def test_settings_survive_pickle_and_json() -> None:
    rows = {
        "name": "cells",
        "things": [[1, "cell", True, [1, 2, 3]]],
        "stuff": [[2, "glass", False, [4, 5, 6]]],
    }
    for config in (PanopticFPNConfig(), PanopticFPNConfig(categories=rows)):  # type: ignore[arg-type]
        fields = json.loads(json.dumps(dataclasses.asdict(config)))
        for copy in (pickle.loads(pickle.dumps(config)), PanopticFPNConfig(**fields)):
            assert copy == config
            assert hash(copy) == hash(config)
            assert copy.categories.stuff[0].color == config.categories.stuff[0].color
    assert fields["categories"] == rows


def test_unknown_preset_lists_the_known_presets() -> None:
    for call in (get_preset, PanopticFPN.from_config):
        with pytest.raises(ValueError, match=r"panoptic_fpn_r18.*panoptic_fpn_r50, panoptic_fpn_r101"):
            call("panoptic_fpn_r18")


def test_from_config_rejects_other_types() -> None:
    with pytest.raises(TypeError, match=r"config: .*got dict"):
        PanopticFPN.from_config({})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(presets))
def test_presets(name: str) -> None:
    config = get_preset(name)
    backbones = {"r50": "resnet50", "r101": "resnet101", "mobilenet": "torchvision:mobilenet_v3_large"}
    assert config.backbone == backbones[name.split("_")[2]]
    counts = (8, 11, "cityscapes") if "cityscapes" in name else (80, 53, "coco_panoptic")
    assert (config.num_things, config.num_stuff, config.categories.name) == counts


def test_plain_name_refers_to_torchvision() -> None:
    assert PanopticFPNConfig(backbone="mobilenet_v3_large").backbone == "torchvision:mobilenet_v3_large"
    assert PanopticFPNConfig(backbone="resnet50").backbone == "resnet50"
    assert PanopticFPNConfig(backbone="timm:convnext_tiny.in12k").backbone == "timm:convnext_tiny.in12k"

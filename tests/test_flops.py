"""The benchmarks' formulas agree with torch's own counter, on every kind of network."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from panfpn_fast.data.sample import Target
from panfpn_fast.models import PanopticFPN
from panfpn_fast.training.network import TrainingNetwork, total

_FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "flops.py"


@pytest.fixture(scope="module")
def flops() -> ModuleType:
    """benchmarks/flops.py, which the package does not install."""
    if not _FILE.is_file():
        pytest.skip("benchmarks/ is not beside tests/")
    spec = importlib.util.spec_from_file_location("benchmarks_flops", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


_NETWORKS: dict[str, dict[str, Any]] = {
    "shared": {},
    "instance": {"tasks": ("instance",)},
    "semantic": {"tasks": ("semantic",)},
    "resnet50": {"backbone": "resnet50"},
    "stride in 3x3": {"backbone": "resnet50", "stride_in_1x1": False, "tasks": ("semantic",)},
    "resnext": {"backbone": "resnext50_32x4d", "tasks": ("semantic",)},
    "concat": {"semantic_fusion": "concat", "tasks": ("semantic",)},
    "groups": {"fpn_groups": 2},
    "agnostic": {"class_agnostic_boxes": True, "class_agnostic_masks": True, "tasks": ("instance",)},
}


def _network(settings: dict[str, Any]) -> PanopticFPN:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "backbone": "resnet10_narrow",
        "num_things": 3,
        "num_stuff": 4,
        "fpn_channels": 32,
    }
    small |= {"box_head_channels": 48, "mask_head_channels": 16, "semantic_channels": 32}
    small |= {"score_threshold": 0.0, "rpn_post_nms_topk": 50, "detections_per_image": 7}
    return PanopticFPN(**(small | settings))


@pytest.mark.parametrize("settings", _NETWORKS.values(), ids=_NETWORKS.keys())
def test_a_prediction(flops: ModuleType, settings: dict[str, Any]) -> None:
    network = _network(settings).eval()
    images = [torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8) for _ in range(2)]
    counted, formula = flops.both_ways([network], lambda: network(images), images)
    assert counted == sum(formula.values()) > 0


@pytest.mark.parametrize("tasks", [("instance", "semantic"), ("instance",), ("semantic",)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_training_step(
    flops: ModuleType, tasks: tuple[str, ...], memory_format: torch.memory_format
) -> None:
    network = _network({"tasks": tasks}).to(memory_format=memory_format)  # type: ignore[call-overload]
    # P2 has 1024 pixels, from which on the head's convolutions are Winograd's where the CPU is made for that.
    images = [torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)]
    instances = torch.zeros(128, 128, dtype=torch.int32)
    instances[16:80, 8:72] = 1
    box = torch.tensor([[8.0, 16.0, 72.0, 80.0]])
    target = Target(box, torch.tensor([1]), instances, (instances == 0).to(torch.uint8))

    def step() -> None:
        loss = total(TrainingNetwork(network)(images, [target], [0]))
        torch.autograd.grad(loss, list(network.parameters()))

    counted, formula = flops.both_ways([network], step, images, training=True)
    assert counted == sum(formula.values()) > 0


def test_two_networks_are_the_sum_of_their_parts(flops: ModuleType) -> None:
    config = _network({}).config
    boxes, size = flops.Boxes(50, 7), (64, 96)
    shared = flops.network_flops(config, size, boxes)
    instance = flops.network_flops(config.replace(tasks=("instance",)), size, boxes)
    semantic = flops.network_flops(config.replace(tasks=("semantic",)), size, boxes)
    twice = {"backbone", "fpn"}
    assert {stage: instance[stage] + semantic[stage] for stage in shared} == {
        stage: (2 if stage in twice else 1) * shared[stage] for stage in shared
    }


def test_the_paper_predicts_after_the_upsampling(flops: ModuleType) -> None:
    config, boxes = _network({}).config, flops.Boxes()
    ours = flops.network_flops(config, (64, 96), boxes)["semantic"]
    plain = flops.network_flops(config, (64, 96), boxes, commuted=False)["semantic"]
    predictor = 2 * (64 // 4) * (96 // 4) * config.semantic_channels * (config.num_stuff + 1)
    assert ours - plain == 0.75 * predictor

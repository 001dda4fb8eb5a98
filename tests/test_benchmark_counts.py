"""Compares the operation counts of the benchmarks with torch's counter, and small cases with counts by hand."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from panfpn_fast.data.sample import Target
from panfpn_fast.models import PanopticFPN
from panfpn_fast.training.network import TrainingNetwork, total
from support.repository import load_harness


@pytest.fixture(scope="module")
def flops() -> ModuleType:
    return load_harness("flops")


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
    # P2 has 1024 pixels and P3 256, the fewest for which `ops.conv3x3` uses 4x4 and 2x2 tiles of Winograd's algorithm.
    images = [torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)]
    instances = torch.zeros(128, 128, dtype=torch.int16)
    instances[16:80, 8:72] = 1
    box = torch.tensor([[8.0, 16.0, 72.0, 80.0]])
    target = Target(box, torch.tensor([1]), instances, (instances == 0).to(torch.int16))

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


def test_saved_bytes() -> None:
    activations = load_harness("activations")
    conv = torch.nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 4, 4)
    # The convolution keeps x, and both ReLUs keep the same result of 3 x 4 x 4.
    assert activations.saved_bytes([conv], lambda: conv(x).relu().relu_()) == 4 * (32 + 48)
    with torch.no_grad():
        assert activations.saved_bytes([conv], lambda: conv(x).relu()) == 0


def test_convolution_outputs() -> None:
    activations = load_harness("activations")
    network = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 1), torch.nn.ReLU(), torch.nn.ConvTranspose2d(3, 1, 2, 2)
    )
    x = torch.randn(1, 2, 4, 4)
    assert activations.convolution_outputs(network, lambda: network(x)) == 3 * 16 + 64
    assert activations.convolution_outputs(network, lambda: None) == 0  # the hooks are removed


def test_maps_agree_regardless_of_ids() -> None:
    agreement = load_harness("agreement")
    ids = torch.tensor([[0, 1, 1, 2], [0, 1, 1, 2]])
    swapped = torch.tensor([[0, 2, 2, 1], [0, 2, 2, 1]])
    assert agreement.same_share(ids, swapped) == 1
    assert (
        agreement.same_share(ids, torch.zeros_like(ids)) == 0.5
    )  # only the 4 pixels of the largest joined segment agree
    ours = agreement.PanopticMap(ids, torch.tensor([True, False]), torch.tensor([7, 3]))
    theirs = agreement.PanopticMap(swapped, torch.tensor([False, True]), torch.tensor([3, 7]))
    agreement.same_maps(1.0)([ours], [theirs])
    with pytest.raises(AssertionError, match="classes on 25"):
        agreement.same_maps(0.9)([ours], [theirs._replace(label=torch.tensor([7, 3]))])
    theirs.ids[0, 3] = 2
    with pytest.raises(AssertionError, match="segments agree on 87"):
        agreement.same_maps(0.9)([ours], [theirs])

"""Networks with one branch, and two such networks instead of one with both branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from panfpn_fast.models import PanopticFPN, PanopticOutput, TwoNetworks, merge_outputs
from panfpn_fast.models.panoptic_fpn import BRANCHES
from support.training_samples import make_sample, small_model

IMAGES = [make_sample(50, 70, 1).image, make_sample(64, 90, 2).image]
SIZES = [(50, 70), (33, 47)]


@pytest.fixture(scope="module")
def joint() -> PanopticFPN:
    return small_model(instance_score_threshold=0.2, detections_per_image=20).eval()


def part(model: PanopticFPN, task: str) -> PanopticFPN:
    """Copies a network with only one of its branches."""
    alone = PanopticFPN.from_config(model.config.replace(tasks=(task,))).eval()
    state = model.state_dict()
    alone.load_state_dict({name: state[name] for name in alone.state_dict()})
    return alone


def tensors(output: PanopticOutput) -> list[Tensor]:
    """Lists the fields of an output and the columns of its segment table."""
    return [x for field in output for x in ([field] if isinstance(field, Tensor) else field)]


def assert_same(found: PanopticOutput, expected: PanopticOutput) -> None:
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_other_branch_does_not_exist(joint: PanopticFPN, task: str) -> None:
    alone = part(joint, task)
    missing = [name for other in BRANCHES if other != task for name in BRANCHES[other]]
    assert not [name for name, _ in alone.named_modules() if name.split(".")[0] in missing]
    expected = {name for name in joint.state_dict() if name.split(".")[0] not in missing}
    assert set(alone.state_dict()) == expected


def test_stuff_only(joint: PanopticFPN) -> None:
    for found, whole in zip(part(joint, "semantic")(IMAGES, SIZES), joint(IMAGES, SIZES), strict=True):
        assert torch.equal(found.semantic, whole.semantic)
        assert len(found.boxes) == len(found.scores) == len(found.classes) == len(found.mask_probs) == 0
        assert found.mask_probs.shape[1:] == whole.mask_probs.shape[1:]
        assert not bool(found.segments.isthing.any())
        expected = torch.zeros_like(found.panoptic)
        for number, label in zip(found.segments.id.tolist(), found.segments.label.tolist(), strict=True):
            expected[found.semantic == label] = number
        assert torch.equal(found.panoptic, expected)
        large = [label for label in range(1, 5) if int((found.semantic == label).sum()) >= 10]
        assert found.segments.label.tolist() == large


def test_things_only(joint: PanopticFPN) -> None:
    for found, whole in zip(part(joint, "instance")(IMAGES, SIZES), joint(IMAGES, SIZES), strict=True):
        assert_same(
            found._replace(panoptic=whole.panoptic, segments=whole.segments, semantic=whole.semantic), whole
        )
        assert found.semantic.dtype == torch.uint8
        assert found.semantic.shape == found.panoptic.shape
        assert not bool(found.semantic.any())
        assert len(found.segments.id) > 0
        assert bool(found.segments.isthing.all())
        # Things come first in the map, so stuff does not change them.
        things = int(whole.segments.isthing.sum())
        assert torch.equal(found.panoptic, torch.where(whole.panoptic <= things, whole.panoptic, 0))


def test_two_networks_with_equal_weights_equal_the_joint_network(joint: PanopticFPN) -> None:
    instance, semantic = part(joint, "instance"), part(joint, "semantic")
    expected = joint(IMAGES, SIZES)
    assert any(bool(output.segments.isthing.any()) for output in expected)
    two = TwoNetworks(instance, semantic).eval()
    assert two.config == joint.config
    assert (two.device, two.dtype) == (joint.device, joint.dtype)
    for found, output in zip(two(IMAGES, SIZES), expected, strict=True):
        assert_same(found, output)
    for found, output in zip(two(IMAGES), joint(IMAGES), strict=True):
        assert_same(found, output)
    merged = merge_outputs(joint.config, instance(IMAGES, SIZES), semantic(IMAGES, SIZES))
    for found, output in zip(merged, expected, strict=True):
        assert_same(found, output)
    assert two([]) == []


def test_each_network_prepares_images_itself(joint: PanopticFPN) -> None:
    semantic = PanopticFPN.from_config(joint.config.replace(channel_order="RGB", size_divisibility=64)).eval()
    semantic.load_state_dict(joint.state_dict())
    for found, things, stuff in zip(
        TwoNetworks(joint, semantic)(IMAGES), joint(IMAGES), semantic(IMAGES), strict=True
    ):
        assert torch.equal(found.boxes, things.boxes)
        assert torch.equal(found.semantic, stuff.semantic)


def test_invalid_pairs_are_rejected(joint: PanopticFPN) -> None:
    instance, semantic = part(joint, "instance"), part(joint, "semantic")
    with pytest.raises(TypeError, match="semantic: expected a PanopticFPN, got Identity"):
        TwoNetworks(instance, torch.nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"instance: .*\('semantic',\)"):
        TwoNetworks(semantic, semantic)
    other = small_model(num_stuff=7, tasks=("semantic",))
    with pytest.raises(ValueError, match="semantic: expected the instance network's num_stuff, 4, got 7"):
        TwoNetworks(instance, other)
    other = small_model(resize="mmdetection", tasks=("semantic",))
    with pytest.raises(ValueError, match="semantic: expected the instance network's resize, 'detectron2'"):
        TwoNetworks(instance, other)
    outputs: list[Any] = instance(IMAGES)
    with pytest.raises(ValueError, match="semantic: expected 2 predictions, as many as in instance, got 1"):
        merge_outputs(joint.config, outputs, outputs[:1])
    with pytest.raises(ValueError, match=r"semantic\[0\]: expected the size of instance\[0\], \[50, 70\]"):
        merge_outputs(joint.config, outputs, outputs[::-1])

"""FPN channels split between the branches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from panfpn_fast.checkpoints import CheckpointError, load
from panfpn_fast.models import TwoNetworks
from panfpn_fast.models.fpn import FPN
from panfpn_fast.training.network import TrainingNetwork, total
from support.checkpoint_samples import save_pickle, small_weights
from support.training_samples import make_batch, make_sample, small_model

IMAGES = [make_sample(50, 70, 1).image]


def test_each_branch_has_half_of_the_channels() -> None:
    model = small_model(fpn_groups=2)
    batch = model.prepare(IMAGES)
    found = model.features(batch.images)
    assert {x.shape[1] for task in ("instance", "semantic") for x in found[task]} == {8}
    assert [x.shape[2:] for x in found["instance"]] == [x.shape[2:] for x in found["semantic"]]
    assert set(model.features(batch.images, ("semantic",))) == {"semantic"}
    [output] = model.eval()(IMAGES)
    assert output.panoptic.shape == (50, 70)

    shared = small_model().features(batch.images)
    assert shared["instance"] is shared["semantic"]


def test_laterals_cost_the_same_and_outputs_half() -> None:
    def weights(*pyramids: FPN) -> tuple[int, int]:
        parts = [(pyramid.lateral, pyramid.output) for pyramid in pyramids]
        counts = [
            [sum(p.numel() for p in part.parameters() if p.ndim > 1) for part in pair] for pair in parts
        ]
        return sum(lateral for lateral, _ in counts), sum(output for _, output in counts)

    shared, grouped = small_model(), small_model(fpn_groups=2)
    halves = [half for half in grouped.fpn.children() if isinstance(half, FPN)]
    assert len(halves) == 2
    assert isinstance(shared.fpn, FPN)
    lateral, output = weights(shared.fpn)
    assert weights(*halves) == (lateral, output // 2)


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_gradients_of_a_task_do_not_reach_the_other_half(task: str) -> None:
    model = small_model(fpn_groups=2)
    network = TrainingNetwork(model)
    total(network(*make_batch(make_sample(50, 70, 1)), branches=(task,))).backward()
    for name, parameter in model.fpn.named_parameters():
        assert (parameter.grad is not None) == name.startswith(f"{task}."), name
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


def test_single_branch_has_only_its_half() -> None:
    model = small_model(fpn_groups=2, instance_score_threshold=0.2).eval()
    state = model.state_dict()
    parts = []
    for task in ("instance", "semantic"):
        alone = small_model(fpn_groups=2, instance_score_threshold=0.2, tasks=(task,)).eval()
        alone.load_state_dict({name: state[name] for name in alone.state_dict()})
        assert {name.split(".")[0] for name, _ in alone.fpn.named_parameters()} == {task}
        parts.append(alone)
    [found], [expected] = TwoNetworks(*parts)(IMAGES), model(IMAGES)
    assert torch.equal(found.panoptic, expected.panoptic)
    assert torch.equal(found.mask_probs, expected.mask_probs)


def test_checkpoint_with_shared_channels_is_rejected(tmp_path: Path) -> None:
    path = save_pickle(tmp_path / "a.pkl", {"model": small_weights()})
    with pytest.raises(
        CheckpointError, match=r"missing: fpn.instance.lateral.p2.weight .* has no counterpart in"
    ):
        load(path, fpn_groups=2)


def test_settings_are_kept() -> None:
    model = small_model(fpn_groups=2)
    assert small_model(**dataclasses.asdict(model.config)).config == model.config
